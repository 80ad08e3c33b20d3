"""The training loop."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from ..data.batching import Batch
from .outputs import Metrics
from .state import Checkpoints, describe_latest
from .step import Report, State

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Loop:
    """Training loop settings.

    Attributes:
        steps: The number of the last step.
        schedule: The learning rate, a function of the number of updates so far.
        accumulation: The number of batches per step.
        save_every: The number of steps between checkpoints.
        eval_every: The number of steps between evaluations. With None, evaluations run
            only before the first step and after the last one.
        log_every: The number of steps between calls of `watch` and, without a terminal,
            between lines on stderr. Steps with an evaluation always have both. With
            None, `watch` is called at each step, and about ten lines are printed.
        patience: With a `Best`: stop after this many evaluations in a row without a
            lower validation loss. None never stops early.
        on_nan: What to do if the loss or the gradient is not finite: "stop" with an
            error, or "skip" the update. If only the new adapter is not finite, the run
            always stops.
        stamp: JSON values to save with each state, besides its position in the data.

    Example:
        >>> from qlora_jax.llm import train
        >>> train.Loop(steps=10, schedule=lambda step: 1e-3).accumulation
        1
    """

    steps: int
    schedule: Callable[[Any], Any]  # as in `optax.Schedule`
    accumulation: int = 1
    save_every: int = 100
    eval_every: int | None = None
    log_every: int | None = None
    patience: int | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    stamp: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Best:
    """The step with the lowest validation loss, whose checkpoint is kept.

    Attributes:
        step: The step, or None if there is none yet.
        loss: The validation loss of that step.
        since: The number of evaluations after that step.

    Example:
        >>> from qlora_jax.llm import train
        >>> best = train.Best()
        >>> [best.see(step, loss) for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4))]
        [True, True, False]
        >>> best
        Best(step=2, loss=0.3, since=1)
    """

    step: int | None = None
    loss: float | None = None
    since: int = 0

    def see(self, step: int, loss: float) -> bool:
        """Returns whether a validation loss is the lowest so far, and records it.

        Args:
            step: The step.
            loss: The validation loss of that step.
        """
        is_lowest = loss < (math.inf if self.loss is None else self.loss)
        self.since += 1
        if is_lowest:
            self.step, self.loss, self.since = step, loss, 0
        return is_lowest


def fit(
    loop: Loop,
    step: Callable[..., tuple[State, Report]],
    state: State,
    base: PyTree,
    data: "grain.DatasetIterator[Batch]",
    *,
    states: Checkpoints,
    metrics: Metrics,
    evaluate: Callable[[Any, State], Mapping[str, float]] | None = None,
    best: Best | None = None,
    watch: Callable[[Mapping[str, Any]], Any] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Trains from a state to the last step.

    Args:
        loop: The settings.
        step: The function from `make_step`.
        state: The initial state, which is donated.
        base: The base tree.
        data: The batches, from `batches`, at the position of the state.
        states: Saves a state every `save_every` steps and after the last step.
        metrics: Writes the metrics of each step, before its state is saved.
        evaluate: A function of the base tree and the state that returns more metrics.
            It runs before the first step, every `eval_every` steps, and after the last.
        best: Finds the step with the lowest `valid_loss` that `evaluate` returns, after
            the first step. The state of that step is kept too.
        watch: Called with the metrics of the steps that `loop.log_every` selects, for
            other loggers.
        stop: Called after each step. Returns whether to stop the run, and must return
            the same value in all processes.

    Returns:
        The state after the last step, which is saved. `loop.patience` may end the run
        earlier.

    Raises:
        FloatingPointError: If the loss or the gradient is not finite and `on_nan` is
            "stop", or if the adapter is not finite. No state is saved.
        OSError: If metrics or a state cannot be written.

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
        >>> loop = train.Loop(steps=2, schedule=lambda step: 0.25)
        >>> with (train.Checkpoints(f"{folder}/state") as states,
        ...       train.Metrics(f"{folder}/metrics.jsonl") as metrics):
        ...     kwargs = dict(states=states, metrics=metrics)
        ...     state = train.fit(loop, step, state, {}, batches, **kwargs)
        >>> float(state.lora["w"])
        0.75
    """
    hooks = states, metrics, evaluate, best, watch, stop
    run = Training(loop, state, base, data, *hooks)
    return drive([run], lambda states, batches: [step(*states, base, batches)])[0]


# A generator that yields the state and the batches of each step. It is then sent the
# new state, a report, and the seconds that the step took. It returns the last state.
Steps = Generator[tuple[State, list[Batch]], tuple[State, Report, float], State]
# Validation losses and their labels. The progress bar shows the first that is computed.
_VALIDATION = {"valid_loss": "validation", "valid_sample_loss": "validation sample"}


def drive(
    runs: Sequence["Training"],
    step: Callable[[list[State], list[Batch]], Sequence[tuple[State, Report]]],
    on_error: Callable[[int, FloatingPointError], object] | None = None,
) -> list[Any]:
    """Trains runs with the same batches side by side, and returns their last states."""
    # If a run fails because of NaN, its state is None, the other runs continue, and
    # `on_error` is called with its index. Without `on_error`, the error is raised.
    # The joint step is compiled for all runs. A run that has failed or finished leaves
    # `live`. The step still updates its state, but the result is ignored.
    live, batches = {*range(len(runs))}, []
    states: list[Any] = [None] * len(runs)
    last_states: list[Any] = [None] * len(runs)
    generators = [run.steps() for run in runs]

    def advance(index, result):
        nonlocal batches
        try:
            states[index], batches = generators[index].send(result)
        except StopIteration as end:
            live.remove(index)
            # The steps of the remaining runs donate the state, so it is copied.
            state = end.value
            last_states[index] = jax.tree.map(jnp.copy, state) if live else state
        except FloatingPointError as error:
            if on_error is None:
                raise
            live.remove(index)
            on_error(index, error)

    with contextlib.ExitStack() as stack:
        for generator in generators:
            stack.enter_context(contextlib.closing(generator))
        for index in range(len(runs)):
            advance(index, None)
        while live:
            start = time.perf_counter()
            results = step(states, batches)
            # JAX returns before the step has run.
            jax.block_until_ready([report for _, report in results])
            seconds = time.perf_counter() - start
            states = [state for state, _ in results]
            for index in sorted(live):
                advance(index, (*results[index], seconds))
    return last_states


@dataclass(eq=False)
class Training:
    """A run of `fit`, with its arguments, whose steps `drive` executes."""

    loop: Loop
    state: State
    base: PyTree
    data: "grain.DatasetIterator[Batch]"
    states: Checkpoints
    metrics: Metrics
    evaluate: Callable[[Any, State], Mapping[str, float]] | None
    best: Best | None
    watch: Callable[[Mapping[str, Any]], Any]
    stop: Callable[[], bool]
    progress: bool = True
    _validation: str = ""  # the latest validation loss, for the progress bar
    _compiled: set[tuple] = field(default_factory=set)  # programs so far

    def steps(self) -> Steps:
        """Yields the state and the batches of each step, and is sent the results."""
        loop, first = self.loop, int(self.state.step)
        is_shown = self.progress and jax.process_index() == 0
        # Evaluate the initial adapter, so that later metrics can be compared with it.
        if first == 0 and self.evaluate is not None:
            self._record({"step": 0})
        # A run that is resumed after it has stopped early takes no more steps.
        last = first if self._is_patience_over() else loop.steps
        # None hides the bar unless stderr is a terminal.
        disable = None if is_shown else True
        settings: dict[str, Any] = {"initial": first, "total": loop.steps}
        with tqdm(desc="training", unit="step", disable=disable, **settings) as bar:
            for step in range(first + 1, last + 1):
                # 1. Take the step. Skipped steps do not advance the schedule.
                batches = [next(self.data) for _ in range(loop.accumulation)]
                num_updates = step - 1 - int(self.state.skipped)
                learning_rate = float(np.asarray(loop.schedule(num_updates)))
                self.state, report, seconds = yield self.state, batches
                # 2. Write the metrics, before the checkpoint of the step.
                row = self._make_row(step, report, batches, seconds, learning_rate)
                if not report.is_finite:
                    self._handle_non_finite(row)
                is_best = self._record(row)
                # 3. Show the progress: a bar on terminals, and otherwise some lines.
                status = self._status(row)
                interval = loop.log_every or math.ceil(loop.steps / 10)
                is_line_due = self._is_evaluated(step) or self._is_due(step, interval)
                if is_shown and bar.disable and is_line_due:
                    line = f"step {step:,} of {loop.steps:,}: {status}"
                    print(line, file=sys.stderr)
                bar.set_postfix_str(status)
                bar.update()
                # 4. Save a checkpoint if one is due.
                is_last = self.stop() or self._is_patience_over()
                if is_last or is_best or self._is_due(step, loop.save_every):
                    self._save()
                if is_last:
                    break
        self.states.wait()
        return self.state

    def _is_due(self, step: int, interval: int | None) -> bool:
        return step == self.loop.steps or bool(interval) and step % interval == 0

    def _is_evaluated(self, step: int) -> bool:
        is_due = step == 0 or self._is_due(step, self.loop.eval_every)
        return self.evaluate is not None and is_due

    def _is_patience_over(self) -> bool:
        patience = math.inf if self.loop.patience is None else self.loop.patience
        return self.best is not None and self.best.since >= patience

    def _make_row(self, step, report, batches, seconds, learning_rate):
        tokens = sum(batch.num_tokens for batch in batches)
        row = {
            "step": step,
            "loss": float(report.loss),
            "grad_norm": float(report.grad_norm),
            "tokens": tokens,
            "trained_tokens": sum(batch.num_trained for batch in batches),
            "tokens_per_s": round(tokens / seconds, 1),
            "seconds": round(seconds, 4),
            **{name: float(x) for name, x in report.metrics.items()},
            "learning_rate": learning_rate,
        }
        # A program is compiled on first use. The first batch of a step has no sums to
        # add to, and the last one also updates the adapter, so each has a program of
        # its own. So does each shape of a batch.
        last = len(batches) - 1
        shapes = [tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches]
        programs = {(i == 0, i == last, shape) for i, shape in enumerate(shapes)}
        if not programs <= self._compiled:
            row["is_compiled"] = True  # the time of this step includes compilation
        self._compiled |= programs
        return row

    def _record(self, row: dict[str, Any]) -> bool:
        # Evaluates if due, writes the row, and returns whether it has the best loss.
        step, is_best = row["step"], False
        if self.evaluate is not None and self._is_evaluated(step):
            row |= self.evaluate(self.base, self.state)
            if step and self.best is not None:
                is_best = self.best.see(step, row["valid_loss"])
        if name := next((name for name in _VALIDATION if name in row), None):
            label = _VALIDATION[name]
            self._validation = f", {label} {row[name]:.4f} at step {step:,}"
        self.metrics.write(**row)
        if self._is_evaluated(step) or self._is_due(step, self.loop.log_every or 1):
            self.watch(row)
        return is_best

    def _status(self, row: Mapping[str, Any]) -> str:
        speed = f"{row['tokens_per_s']:,.0f} tokens/s"
        if "is_compiled" in row:
            speed = f"{row['seconds']:.1f} s with compilation"
        return f"loss {row['loss']:.4f}{self._validation}, {speed}"

    def _save(self) -> None:
        metadata = {**self.loop.stamp, "position": self.data.get_state()}
        if self.best is not None:
            metadata["best"], self.states.best = asdict(self.best), self.best.step
        self.states.save(self.state, metadata)

    def _handle_non_finite(self, row: dict[str, Any]) -> None:
        loss, norm = row["loss"], row["grad_norm"]
        problem = f"step {row['step']} has loss {loss:.4g} and gradient norm {norm:.4g}"
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if self.loop.on_nan == "skip" and is_skipped:
            if jax.process_index() == 0:
                tqdm.write(f"{problem}: its update is skipped", file=sys.stderr)
            return
        if not is_skipped:
            problem += ", but its new adapter weights are not finite"
        advice = ", or `on_nan: skip`" if is_skipped else ""
        self.metrics.write(**row)
        self.states.wait()
        raise FloatingPointError(
            f"{problem}. {describe_latest(self.states)}. Try a smaller "
            f"`learning_rate`{advice}."
        )
