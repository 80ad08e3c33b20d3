"""The state, the data and the settings with which a run is trained."""

import pathlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax

import qlora_jax as ql

from .._jax.progress import plural
from .evaluation import Evaluation
from .processes import Stop, all_or_none, is_first, tell
from .program import Program, make_schedule
from .run import Run, check_stamp, make_batches
from .run_folder import CONFIG, METRICS, STATE


def check_states(
    runs: Sequence[Run], states: Sequence["ql.train.Checkpoints"]
) -> int | None:
    """Returns the step to resume after; None for a new run. Refuses other settings."""
    config, after = runs[0].config, runs[0].config.resume_step
    steps = set.intersection(*({*one.steps} for one in states))
    if after is None:
        after = max(steps, default=None)
    if after is None:
        if config.resume:
            tell(
                f"{config.out} holds no state: the run begins again at step 0, and "
                f"{METRICS} with it"
            )
        return None
    saved = [one.metadata(after)["settings"] for one in states]
    with all_or_none():
        for run, settings in zip(runs, saved, strict=True):
            check_stamp(settings, run.stamp, run.config.out)
    is_last = all(one.latest == after for one in states)
    later = "" if is_last else "; states of later steps are deleted"
    tell(f"going on after step {after:,} of {config.steps:,}{later}")
    return after


class Fitting:
    """A run with its state, at the step that it goes on from."""

    def __init__(
        self,
        run: Run,
        states: "ql.train.Checkpoints",
        base: Any,
        program: Program,
        evaluate: Evaluation | None,
        after: int | None,
    ):
        """Makes the state, or reads that of step `after`."""
        config = run.config
        lora = _make_adapters(run, base, jax.random.key(config.seed))
        self.run, self.states, self.base = run, states, base
        self.state = ql.train.State.create(lora, program.optimizer, config.seed)
        self.best = ql.train.Best() if config.keep_best else None
        self.evaluate = evaluate
        self.data = make_batches(config, run.data)
        if after is not None:
            self._go_on(after)
        self.loop = ql.train.Loop(
            steps=config.steps or 0,
            schedule=make_schedule(config),
            accumulation=config.accumulation,
            save_every=config.save_every,
            eval_every=config.eval_steps,
            log_every=config.log_every,
            patience=config.early_stopping_patience,
            on_nan=config.on_nan,
            stamp={"settings": run.stamp},
        )

    def _go_on(self, after: int) -> None:
        self.state, about = self.states.restore(self.state, after)
        self.data.set_state(about["position"])
        self.states.remove_after(after)
        found = about.get("best", {})
        if self.best is None or not found:
            return
        if found["step"] in (None, *self.states.steps):
            self.best = ql.train.Best(**found)
        else:
            tell(f"the best state, of step {found['step']:,}, is no longer there")

    def kept(
        self, state: "ql.train.State"
    ) -> tuple["ql.train.State", Mapping[str, float]]:
        """Returns the last state with the adapter that is kept, and its numbers."""
        best = self.best
        if best is None or self.evaluate is None or best.step is None:
            return state, {}
        if int(state.step) < self.loop.steps:
            tell(
                f"no lower validation loss in {plural(best.since, 'evaluation')}: "
                f"{self.run.folder} ends after step {int(state.step):,}"
            )
        kept, _ = self.states.restore(state, best.step)
        found = {"best_step": best.step}
        if best.step < self.loop.steps:
            found |= self.evaluate(self.base, kept, is_end=True)
        return state._replace(lora=kept.lora), found


def end_at_signal(stop: Stop, step: int, folder: pathlib.Path) -> None:
    """Says how to go on with the run in a folder, and ends as the signal would."""
    states = folder / STATE
    tell(
        f"the state of step {step:,} is in {states if states.is_dir() else folder}; go "
        f"on by: qlora-jax train --config {shlex.quote(str(folder / CONFIG))} --resume"
    )
    stop.end()


def _make_adapters(run: Run, base: Any, key: Any) -> Any:
    key = jax.random.fold_in(key, 0)
    add = lambda base: ql.init(key, base, run.adapters)[1]
    if run.mesh is None:
        return add(base)
    _, placed = run.place(base, jax.eval_shape(add, base))
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    return jax.jit(add, out_shardings=shardings)(base)  # each device its part


def open_metrics(folder: pathlib.Path, after: int | None) -> Any:
    """Opens the metrics, which only the first process writes."""
    if is_first():
        return ql.train.Metrics(folder / METRICS, after=after)
    return nullcontext(SimpleNamespace(write=lambda **row: None))
