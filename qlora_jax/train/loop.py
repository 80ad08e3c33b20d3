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
from tqdm import tqdm

from .._jax.progress import progress_bar
from .data.batching import Batch
from .report import Metrics
from .state import Checkpoints
from .step import Report, State

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Loop:
    """Training loop settings.

    Attributes:
        steps: The last step.
        schedule: The learning rate, a function of the updates made so far.
        accumulation: Batches of a step.
        save_every: Steps between states.
        eval_every: Steps between evaluations; None for one at the end.
        log_every: Steps between calls of `watch` and, where there is no terminal, lines
            on stderr; evaluations have both, too. None for `watch` at each step, and
            for about ten lines.
        patience: Evaluations in a row without a lower validation loss after which to
            end, with a `Best`; None for no end.
        on_nan: If loss or gradient is not finite: "stop" with an error, or "skip" the
            update. If only the new adapter is not finite, a run always stops.
        stamp: JSON values to save with each state, with the position in the data.

    Example:
        >>> from qlora_jax import train
        >>> train.Loop(steps=10, schedule=lambda step: 1e-3).accumulation
        1
    """

    steps: int
    schedule: Callable[[Any], Any]
    accumulation: int = 1
    save_every: int = 100
    eval_every: int | None = None
    log_every: int | None = None
    patience: int | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    stamp: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Best:
    """The step of the lowest validation loss, which is kept.

    Attributes:
        step: The step; None if there is none yet.
        loss: Its validation loss.
        since: Evaluations after it.

    Example:
        >>> from qlora_jax import train
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
        """Returns whether a step's validation loss is the lowest, and notes it.

        Args:
            step: The step.
            loss: Its validation loss.
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
    base: Any,
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
        step: From `make_step`.
        state: Where to start; it is donated.
        base: The base tree.
        data: The batches, from `batches`, at the state's position.
        states: Saves states: every `save_every` steps and after the last.
        metrics: Writes each step's numbers, before its state is saved.
        evaluate: A function of the base tree and the state that returns more numbers;
            it runs before the first step, every `eval_every` steps and after the last.
        best: Finds the step of the lowest `valid_loss` that `evaluate` returns, after
            the first step: its state is kept too.
        watch: Called with a step's numbers, for other loggers; see `loop.log_every`.
        stop: Whether to end, called after each step; the same in all processes.

    Returns:
        The state after the last step, which is saved. `loop.patience` may end earlier.

    Raises:
        FloatingPointError: If loss or gradient is not finite and `on_nan` is "stop", or
            if the adapter is not. The step is named, and no state is saved.
        OSError: If metrics or a state cannot be written.

    Example:
        >>> import tempfile, jax.numpy as jnp, numpy as np, optax
        >>> from qlora_jax import train
        >>> rows = [train.Row(np.ones(3, np.int32), np.ones(3, np.int32), "")]
        >>> data = train.batches(
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
        ...     state = train.fit(loop, step, state, {}, data, **kwargs)
        >>> float(state.lora["w"])
        0.75
    """
    kwargs: Any = dict(states=states, metrics=metrics, evaluate=evaluate, best=best)
    run = training(loop, state, base, data, watch=watch, stop=stop, **kwargs)
    one = lambda states, batches: [step(*states, base, batches)]
    return drive([run], one)[0]


# A run waits for the step of its state and batches. It gets a state, a report, and the
# seconds that the step took.
Run = Generator[tuple[State, list[Batch]], tuple[State, Report, float], State]


def drive(
    runs: Sequence[Run],
    step: Callable[[list[State], list[Batch]], Sequence[tuple[State, Report]]],
    on_error: Callable[[int, FloatingPointError], Any] | None = None,
) -> list[Any]:
    """Makes the steps of runs that have the same batches; returns their last states.

    `on_error` is told which run fails because of a NaN: the others go on, and its state
    is None. Without it, the error is raised.
    """
    live, batches = {*range(len(runs))}, []
    states: list[Any] = [None] * len(runs)
    last: list[Any] = [None] * len(runs)

    def go_on(number: int, made: Any) -> None:
        nonlocal batches
        try:
            states[number], batches = runs[number].send(made)
        except StopIteration as end:
            live.remove(number)
            # Its state is donated to the steps of the others.
            last[number] = jax.tree.map(jnp.copy, end.value) if live else end.value
        except FloatingPointError as error:
            if on_error is None:
                raise
            live.remove(number)
            on_error(number, error)

    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(contextlib.closing(run))
        for number in range(len(runs)):
            go_on(number, None)
        while live:
            began = time.perf_counter()
            made = step(states, batches)
            jax.block_until_ready([report for _, report in made])
            seconds = time.perf_counter() - began
            states = [state for state, _ in made]
            for number in sorted(live):
                go_on(number, (*made[number], seconds))
    return last


def training(
    loop: Loop,
    state: State,
    base: Any,
    data: "grain.DatasetIterator[Batch]",
    *,
    states: Checkpoints,
    metrics: Metrics,
    evaluate: Callable[[Any, State], Mapping[str, float]] | None,
    best: Best | None,
    watch: Callable[[Mapping[str, Any]], Any],
    stop: Callable[[], bool],
    progress: bool = True,
) -> Run:
    """Returns a run of `fit`, which `drive` makes the steps of."""
    first, is_first = int(state.step), progress and jax.process_index() == 0
    is_due = lambda number, every: number == loop.steps or every and not number % every
    patience = math.inf if loop.patience is None else loop.patience
    is_over = lambda: best is not None and best.since >= patience
    log_every = loop.log_every or math.ceil(loop.steps / 10)
    compiled: set[Any] = set()  # what `_programs` returns of the steps so far
    validation = ""  # the newest validation loss

    def is_evaluated(number: int) -> bool:
        """Returns whether a step has an evaluation."""
        is_first_or_due = not number or is_due(number, loop.eval_every)
        return evaluate is not None and is_first_or_due

    def record(row: dict[str, Any], number: int) -> bool:
        """Writes a step's numbers; returns whether its validation loss is the best."""
        nonlocal validation
        is_best = False
        if evaluate is not None and is_evaluated(number):
            row |= evaluate(base, state)
            if number and best is not None:
                is_best = best.see(number, row["valid_loss"])
        if name := next((name for name in _VALIDATION if name in row), None):
            validation = f", {_VALIDATION[name]} {row[name]:.4f} at step {number:,}"
        metrics.write(**row)
        if is_evaluated(number) or is_due(number, loop.log_every or 1):
            watch(row)
        return is_best

    if not first and evaluate is not None:
        record({"step": 0}, 0)
    span: Any = dict(initial=first, total=loop.steps)
    with progress_bar("training", "step", is_first, **span) as bar:
        for number in range(first + 1, 0 if is_over() else loop.steps + 1):
            batches = [next(data) for _ in range(loop.accumulation)]
            # Skipped steps do not advance the optimizer's schedule.
            rate = float(np.asarray(loop.schedule(number - 1 - int(state.skipped))))
            state, report, seconds = yield state, batches
            row = _numbers(number, report, batches, seconds)
            row["learning_rate"] = rate
            programs = _programs(batches)
            if not programs <= compiled:
                row["is_compiled"] = True
            compiled |= programs
            if not report.is_finite:
                _on_nan(loop, row, states, metrics)
            is_best = record(row, number)
            speed = f"{row['tokens_per_s']:,.0f} tokens/s"
            if "is_compiled" in row:
                speed = f"{seconds:.1f} s with compilation"
            status = f"loss {row['loss']:.4f}{validation}, {speed}"
            is_shown = is_evaluated(number) or is_due(number, log_every)
            if is_first and bar.disable and is_shown:
                print(f"step {number:,} of {loop.steps:,}: {status}", file=sys.stderr)
            bar.set_postfix_str(status)
            bar.update()
            is_last = stop() or is_over()
            if is_last or is_best or is_due(number, loop.save_every):
                about = {**loop.stamp, "position": data.get_state()}
                if best is not None:
                    about["best"], states.best = asdict(best), best.step
                states.save(state, about)
            if is_last:
                break
    states.wait()
    return state


# What the progress calls validation losses; of several it has the first.
_VALIDATION = {"valid_loss": "validation", "valid_sample_loss": "validation sample"}


def _programs(batches: list[Batch]) -> set[Any]:
    """Returns a key for each program that a step runs, and compiles the first time.

    They differ for the first batch, the last one and those between, and by shapes.
    """
    last = len(batches) - 1
    shapes = (tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches)
    return {(i == 0, i == last, shape) for i, shape in enumerate(shapes)}


def _numbers(
    number: int, report: Report, batches: list[Batch], seconds: float
) -> dict[str, Any]:
    """Returns the metrics of a step."""
    tokens = sum(batch.num_tokens for batch in batches)
    return {
        "step": number,
        "loss": float(report.loss),
        "grad_norm": float(report.grad_norm),
        "tokens": tokens,
        "trained_tokens": sum(batch.num_trained for batch in batches),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
        **{name: float(x) for name, x in report.metrics.items()},
    }


def _on_nan(
    loop: Loop, row: dict[str, Any], states: Checkpoints, metrics: Metrics
) -> None:
    """Prints which step is skipped for NaN or infinity, or raises."""
    loss, norm = row["loss"], row["grad_norm"]
    what = f"step {row['step']} has loss {loss:.4g}, a gradient of norm {norm:.4g}"
    is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
    if loop.on_nan == "skip" and is_skipped:
        if jax.process_index() == 0:
            tqdm.write(f"{what}: its update is skipped", file=sys.stderr)
        return
    if not is_skipped:
        what += ", and an adapter that is not finite behind it"
    advice = ", or `on_nan: skip`" if is_skipped else ""
    metrics.write(**row)
    states.wait()
    last = states.latest
    kept = "No state is saved" if last is None else f"The last state is that of {last}"
    raise FloatingPointError(f"{what}. {kept}. Try a smaller `learning_rate`{advice}.")
