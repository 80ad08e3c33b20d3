"""The training loop, and the protocol of its callbacks."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ..data.batching import Batch
from .step import Report, State

if TYPE_CHECKING:
    import grain


@dataclass
class Training:
    """The progress of one call of `fit`, which is passed to its callbacks.

    Attributes:
        steps: The total number of steps, including those before a resumed state.
        batches: The iterator over batches.
        state: The state after the latest step. Do not keep its arrays, because the next
            step donates it.
        step: The number of steps taken so far, which is the number of the latest step.
        row: The metrics of the latest step, to which callbacks may add. Empty before
            the first step, unless `Evaluate` has added metrics to it.
        evaluation: The metrics of an evaluation after the latest step. Empty if there
            was none.
        is_finite: Whether the loss, the gradient and the new adapter are finite.
        is_over: Whether training ends after the latest step. Callbacks may set it.
    """

    steps: int
    batches: "grain.DatasetIterator[Batch]"
    state: State
    step: int
    row: dict[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    is_finite: bool = True
    is_over: bool = False

    def is_due(self, every: int | None) -> bool:
        """Returns whether the step is the last one, or a multiple of `every`."""
        return self.step == self.steps or bool(every) and self.step % every == 0


class Callback:
    """Reacts to the steps of `fit`. By default, the methods do nothing."""

    def on_start(self, training: Training) -> None:
        """Called before the first step."""

    def on_step(self, training: Training) -> None:
        """Called after each step."""

    def on_end(self, training: Training) -> None:
        """Called after the last step, unless an error has ended the run."""


def fit(
    state: State,
    step: Callable[[State, Sequence[Batch]], tuple[State, Report]],
    batches: "grain.DatasetIterator[Batch]",
    *,
    steps: int,
    accumulation: int = 1,
    schedule: Callable[[Any], Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> State:
    """Trains from a state to the last step.

    `fit` takes the steps and collects their metrics. Callbacks do everything else. They
    are called in the order in which they are passed, which should be: `CheckFinite`,
    `Evaluate`, `Metrics`, `LogRows`, `ShowProgress`, `SaveStates`. `schedule` maps the
    number of updates to the learning rate, for the metrics.
    """
    if accumulation < 1:
        raise ValueError(f"`accumulation` must be positive. Got {accumulation}.")
    training = Training(steps, batches, state, step=int(state.step))
    for callback in callbacks:
        callback.on_start(training)
    compiled_programs: set[tuple] = set()
    while training.step < steps and not training.is_over:
        # 1. Take the step.
        step_batches = [*itertools.islice(batches, accumulation)]
        is_last = training.step + 1 == steps
        if not step_batches or (len(step_batches) < accumulation and not is_last):
            raise ValueError(
                f"`batches` must not end before step {steps}, and needs {accumulation} "
                f"for each earlier step. It ended after step {training.step}."
            )
        # Skipped steps do not advance the schedule.
        num_updates = training.step - int(training.state.skipped)
        start = time.perf_counter()
        training.state, report = step(training.state, step_batches)
        jax.block_until_ready(report)  # JAX returns before the step has run
        seconds = time.perf_counter() - start
        # 2. Collect its metrics.
        training.step += 1
        training.evaluation = {}
        training.is_finite = bool(report.is_finite)
        training.row = {"step": training.step} | _metrics(report, step_batches, seconds)
        if schedule is not None:
            training.row["learning_rate"] = float(schedule(num_updates))
        if new_programs := _program_keys(step_batches) - compiled_programs:
            training.row["is_compiled"] = True  # `seconds` includes compilation
            compiled_programs |= new_programs
        # 3. Evaluate, write and save what is due.
        for callback in callbacks:
            callback.on_step(training)
    for callback in callbacks:
        callback.on_end(training)
    return training.state


def _metrics(
    report: Report, batches: Sequence[Batch], seconds: float
) -> dict[str, Any]:
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        "loss": float(report.loss),
        "grad_norm": float(report.grad_norm),
        "tokens": tokens,
        "trained_tokens": sum(batch.num_trained for batch in batches),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        **{name: float(x) for name, x in report.metrics.items()},
    }


def _program_keys(batches: Sequence[Batch]) -> set[tuple]:
    # Identifies the compiled programs that these batches run. The first batch of a step
    # starts the sums to which later batches add, and the last one also updates the
    # adapter, so both need programs of their own. So does each shape of a batch.
    last = len(batches) - 1
    shapes = [tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches]
    return {(i == 0, i == last, shape) for i, shape in enumerate(shapes)}
