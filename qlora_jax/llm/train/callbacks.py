"""Callbacks of `fit`: evaluations, checks, progress and saved states."""

# ruff: noqa: D102 (the methods have the docstrings of `Callback`)

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import jax
from tqdm import tqdm

from .checkpoints import Checkpoints, describe_latest
from .loop import Callback, Training
from .outputs import Metrics
from .step import State


@dataclass
class Best:
    """The step with the lowest validation loss so far. `SaveStates` keeps its state.

    Attributes:
        step: The step, or None if there is none yet.
        loss: The validation loss of that step.
        since: The number of evaluations after that step.
    """

    step: int | None = None
    loss: float | None = None
    since: int = 0

    def see(self, step: int, loss: float) -> bool:
        """Returns whether a validation loss is the lowest so far, and records it."""
        is_lowest = loss < (math.inf if self.loss is None else self.loss)
        self.since += 1
        if is_lowest:
            self.step, self.loss, self.since = step, loss, 0
        return is_lowest


@dataclass(eq=False)
class Evaluate(Callback):
    """Evaluates the adapter at intervals, after the last step, and before the first.

    Attributes:
        evaluate: A function of the state that returns metrics.
        every: The number of steps between evaluations. None evaluates only before the
            first step and after the last one.
        best: Records the step with the lowest `valid_loss`. The evaluation before the
            first step does not count.
        patience: The number of evaluations in a row without a lower `valid_loss` after
            which training ends. None never ends it early. Ignored without `best`.
        at_start: Whether to evaluate before the first step.
    """

    evaluate: Callable[[State], Mapping[str, float]]
    every: int | None = None
    best: Best | None = None
    patience: int | None = None
    at_start: bool = True

    def on_start(self, training: Training) -> None:
        # Evaluate the initial adapter, so that later metrics can be compared with it.
        if training.step == 0 and self.at_start:
            training.evaluation = self.evaluate(training.state)
            training.row = {"step": 0, **training.evaluation}
        self._check_patience(training)  # a resumed run may have no patience left

    def on_step(self, training: Training) -> None:
        if training.is_due(self.every):
            training.evaluation = self.evaluate(training.state)
            training.row |= training.evaluation
            if self.best is not None:
                self.best.see(training.step, training.evaluation["valid_loss"])
            self._check_patience(training)

    def _check_patience(self, training: Training) -> None:
        if self.best is not None and self.patience is not None:
            training.is_over |= self.best.since >= self.patience


@dataclass(eq=False)
class CheckFinite(Callback):
    """Handles steps whose loss, gradient or new adapter is not finite.

    If the loss or the gradient is not finite, the step has left the adapter unchanged,
    and `on_nan` decides whether training goes on. If only the new adapter is not
    finite, a FloatingPointError always ends the run.

    With a loss scale above 1, a gradient that is not finite is only an overflow in
    float16. Training then always goes on, with a smaller loss scale.

    Attributes:
        states: The saved states of the run. The error names the latest one.
        metrics: The callback that writes metrics. It writes those of the failed step
            before the error is raised.
        on_nan: What to do if the loss or the gradient is not finite. "stop" ends the
            run with a FloatingPointError. "skip" goes on without the update.
    """

    states: Checkpoints
    metrics: Metrics | None = None
    on_nan: Literal["stop", "skip"] = "stop"

    def on_step(self, training: Training) -> None:
        if training.is_finite:
            return
        loss, norm = training.row["loss"], training.row["grad_norm"]
        loss_scale = training.row.get("loss_scale")
        problem = (
            f"step {training.step} has loss {loss:.4g} and gradient norm {norm:.4g}"
        )
        if loss_scale is not None:
            problem += f" at loss scale {loss_scale:g}"
        # If both are finite, only the new adapter is not.
        is_skipped = not (math.isfinite(loss) and math.isfinite(norm))
        is_overflow = is_skipped and math.isfinite(loss) and (loss_scale or 1) > 1
        if is_overflow or (is_skipped and self.on_nan == "skip"):
            count = int(training.state.skipped)
            if jax.process_index() == 0:
                text = f"{problem}: its update is skipped ({count:,} so far)"
                tqdm.write(text, file=sys.stderr)
            return
        if not is_skipped:
            problem += ", but its new adapter weights are not finite"
        advice = ["a smaller `learning_rate`"]
        advice += ["`on_nan: skip`"] if is_skipped else []
        advice += [] if loss_scale is None else ["`dtype: float32`"]
        if training.step == 1 and is_skipped:  # no update came before
            advice[0] = (
                "other rows or weights, as a smaller `learning_rate` cannot help"
            )
        if self.metrics is not None:
            self.metrics.on_step(training)
        self.states.wait()
        raise FloatingPointError(
            f"{problem}. {describe_latest(self.states)}. Try {', or '.join(advice)}."
        )


@dataclass(eq=False)
class LogRows(Callback):
    """Passes the metrics of each step to a logger."""

    log_row: Callable[[Mapping[str, Any]], object]  # takes the metrics of a step

    def on_start(self, training: Training) -> None:
        if training.evaluation:
            self.log_row(training.row)

    def on_step(self, training: Training) -> None:
        self.log_row(training.row)


# The validation losses that the progress can show, with their labels. It shows the
# first one that an evaluation has computed.
_LOSS_LABELS = {"valid_loss": "validation", "valid_sample_loss": "validation sample"}


class ShowProgress(Callback):
    """Shows a progress bar on terminals, and otherwise prints some lines on stderr."""

    def __init__(self):
        self._validation_text = ""  # the latest validation loss
        self._bar: Any = None

    def __enter__(self) -> "ShowProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_start(self, training: Training) -> None:
        # With `disable=None`, tqdm shows the bar only if stderr is a terminal.
        disable = None if jax.process_index() == 0 else True
        settings: Any = {"initial": training.step, "total": training.steps}
        # tqdm's default leaves no room for the bar and the speed on 110 columns.
        layout = "{n_fmt}/{total_fmt} |{bar:10}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(bar_format=layout, disable=disable, **settings)
        self._update_validation(training)

    def on_step(self, training: Training) -> None:
        self._update_validation(training)
        row, bar, steps = training.row, self._bar, training.steps
        speed = f"{row['tokens_per_s']:,.0f} tokens/s"
        if "is_compiled" in row:
            speed = f"{row['seconds']:.1f} s with compilation"
        rewards = ""
        if "rewards/margins" in row:
            names = "chosen", "rejected", "margins"
            values = (f"{row[f'rewards/{name}']:.3f}" for name in names)
            rewards = ", rewards {} and {}, margin {}".format(*values)
        loss = f"loss {row['loss']:.4f}{rewards}{self._validation_text}"
        status = f"{loss}, {speed}"
        is_due = training.is_due(math.ceil(steps / 10))
        if (is_due or training.evaluation) and bar.disable and not jax.process_index():
            print(f"step {training.step:,} of {steps:,}: {status}", file=sys.stderr)
        bar.set_postfix_str(status)
        bar.update()

    def on_end(self, training: Training) -> None:
        self._bar.close()

    def _update_validation(self, training: Training) -> None:
        for name, label in _LOSS_LABELS.items():
            if (loss := training.evaluation.get(name)) is not None:
                text = f", {label} {loss:.4f} at step {training.step:,}"
                self._validation_text = text
                return


@dataclass(eq=False)
class SaveStates(Callback):
    """Saves the state at intervals, after each new best step, and after the last step.

    Attributes:
        states: The folder of the saved states.
        every: The number of steps between saved states.
        metadata: JSON values to save with each state. The position in the data is
            always added.
        best: The step with the lowest validation loss so far. Its state is kept in
            addition to the newest ones.
    """

    states: Checkpoints
    every: int = 100
    metadata: Mapping[str, Any] = field(default_factory=dict)
    best: Best | None = None
    _saved_step: int | None = None

    def on_start(self, training: Training) -> None:
        self._saved_step = training.step

    def on_step(self, training: Training) -> None:
        is_best = self.best is not None and self.best.step == training.step
        if is_best or training.is_due(self.every):
            self._save(training)

    def on_end(self, training: Training) -> None:
        if self._saved_step != training.step:
            self._save(training)
        self.states.wait()

    def _save(self, training: Training) -> None:
        metadata = {**self.metadata, "position": training.batches.get_state()}
        if self.best is not None:
            metadata["best"] = asdict(self.best)
            self.states.best = self.best.step
        self.states.save(training.state, metadata)
        self._saved_step = training.step
