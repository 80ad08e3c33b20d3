"""The training loop, and the protocol of its callbacks."""

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
    """A call of `fit`, as its callbacks see it.

    Attributes:
        steps: The number of the last step.
        batches: The iterator over batches.
        full_state: The state after the latest step. In a sweep, it has all adapters.
        step: The number of the latest step.
        row: The metrics of the latest step, to which callbacks may add. In a sweep, the
            metrics that differ are lists. Empty before the first step.
        evaluation: Those metrics that an evaluation has added.
        is_finite: Whether the loss, the gradient and the new adapter are finite.
        is_over: Whether the latest step is the last one.
        index: The index of the adapter, in the callbacks of one adapter of a sweep.

    Example:
        >>> from qlora_jax.llm import train
        >>> training = train.Training(10, iter([]), full_state=None, step=4)
        >>> [training.is_due(every) for every in (2, 3, None)]
        [True, False, False]
    """

    steps: int
    batches: "grain.DatasetIterator[Batch]"
    full_state: State
    step: int
    row: dict[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    is_finite: bool | list[bool] = True
    is_over: bool = False
    index: int | None = None

    @property
    def state(self) -> State:
        """The state after the latest step, which the next step donates."""
        state = self.full_state
        return state if self.index is None else state.member(self.index)

    def is_due(self, every: int | None) -> bool:
        """Returns whether the step is the last one, or one of every few.

        Args:
            every: The number of steps between two that are due. None for the last step
                only.
        """
        return self.step == self.steps or bool(every) and self.step % every == 0


class Callback:
    """Reacts to the steps of `fit`. By default, the methods do nothing.

    Example:
        >>> from qlora_jax.llm import train
        >>> class StopAtLoss(train.Callback):
        ...     def on_step(self, training):
        ...         training.is_over = training.row["loss"] < 0.1
    """

    def on_start(self, training: Training) -> None:
        """Called before the first step.

        Args:
            training: The run.
        """

    def on_step(self, training: Training) -> None:
        """Called after each step.

        Args:
            training: The run. Setting its `is_over` ends it.
        """

    def on_end(self, training: Training) -> None:
        """Called after the last step, unless an error has ended the run.

        Args:
            training: The run.
        """


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

    Everything else is the work of callbacks, which are called one after another. Pass
    them in this order: `CheckFinite`, `Evaluate`, `Metrics`, `LogRows`, `ShowProgress`,
    `SaveStates`. For a sweep, pass a stacked state, a step with several learning rates,
    and `ForMembers`, which has the callbacks of each adapter.

    Args:
        state: The initial state, which is donated.
        step: A function of the state and a list of batches, such as the function from
            `make_step` with the base tree filled in.
        batches: The batches, from `batches`, at the position of the state.
        steps: The number of the last step.
        accumulation: The number of batches per step.
        schedule: The learning rate as a function of the number of updates, for the
            metrics. In a sweep, a function of a list that returns an array.
        callbacks: The callbacks.

    Returns:
        The state after the last step.

    Example:
        >>> import tempfile, jax.numpy as jnp, numpy as np, optax
        >>> from qlora_jax.llm import data, train
        >>> rows = [data.Row(np.ones(3, np.int32), np.ones(3, np.int32), "")]
        >>> batches = data.batches(
        ...     rows, batch_size=1, max_length=3, seed=0, packing=False)
        >>> loss = lambda lora, base, batch, key: (
        ...     jnp.sum((lora["w"] - batch.targets) ** 2 * batch.weights),
        ...     jnp.sum(batch.weights))
        >>> state = train.State.create({"w": jnp.zeros(())}, optax.sgd(0.25), seed=0)
        >>> step, folder = train.make_step(loss, optax.sgd(0.25)), tempfile.mkdtemp()
        >>> with (train.Checkpoints(f"{folder}/state") as states,
        ...       train.Metrics(f"{folder}/metrics.jsonl") as metrics):
        ...     state = train.fit(
        ...         state, lambda state, batches: step(state, {}, batches), batches,
        ...         steps=2, callbacks=[metrics, train.SaveStates(states)])
        >>> float(state.lora["w"])
        0.75
        >>> [row["loss"] for row in train.read_metrics(f"{folder}/metrics.jsonl")]
        [1.0, 0.25]
    """
    # The adapters of a sweep are all at the same step.
    training = Training(steps, batches, state, step=int(np.max(state.step)))
    for callback in callbacks:
        callback.on_start(training)
    programs: set[tuple] = set()
    while training.step < steps and not training.is_over:
        # 1. Take the step.
        step_batches = [next(batches) for _ in range(accumulation)]
        # Skipped steps do not advance the schedule.
        num_updates = training.step - np.asarray(training.full_state.skipped)
        start = time.perf_counter()
        training.full_state, report = step(training.full_state, step_batches)
        jax.block_until_ready(report)  # JAX returns before the step has run
        seconds = time.perf_counter() - start
        # 2. Collect its metrics.
        training.step += 1
        training.evaluation = {}
        training.is_finite = np.asarray(report.is_finite).tolist()
        training.row = {
            "step": training.step,
            **_metrics(report, step_batches, seconds),
        }
        if schedule is not None:
            learning_rate = schedule(num_updates.tolist())
            training.row["learning_rate"] = np.asarray(learning_rate).tolist()
        if not (new_programs := _programs_of(step_batches)) <= programs:
            training.row["is_compiled"] = True  # `seconds` includes compilation
            programs |= new_programs
        # 3. Evaluate, write and save what is due.
        for callback in callbacks:
            callback.on_step(training)
    for callback in callbacks:
        callback.on_end(training)
    return training.full_state


def _metrics(
    report: Report, batches: Sequence[Batch], seconds: float
) -> dict[str, Any]:
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        "loss": np.asarray(report.loss).tolist(),
        "grad_norm": np.asarray(report.grad_norm).tolist(),
        "tokens": tokens,
        "trained_tokens": sum(batch.num_trained for batch in batches),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        **{name: np.asarray(x).tolist() for name, x in report.metrics.items()},
    }


def _programs_of(batches: Sequence[Batch]) -> set[tuple]:
    # A program is compiled on first use. The first batch of a step has no sums to add
    # to, and the last one also updates the adapter, so each has a program of its own.
    # So does each shape of a batch.
    last = len(batches) - 1
    shapes = [tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches]
    return {(i == 0, i == last, shape) for i, shape in enumerate(shapes)}
