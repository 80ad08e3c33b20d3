"""`qlora-jax train`: fine-tunes a model on data."""

import datetime
import pathlib
import shlex
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import set_mesh

import qlora_jax as ql

from .evaluation import Evaluation
from .hub import push
from .loggers import open_loggers
from .processes import (
    agree,
    all_or_none,
    catch_signals,
    check_shared,
    is_first,
    only_in_first,
    start,
    tell,
)
from .program import make_program, make_put, make_schedule
from .run import Run, check_stamp, make_batches, make_run
from .run_folder import CONFIG, METRICS, STATE, quiet_orbax, run_folder, write_settings
from .run_results import TrainResult, finish
from .train_config import TrainConfig


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes a model on data, and writes an adapter that PEFT loads.

    Settings, data, module names, the folder and (with `resume`) the run's settings are
    checked before the model is read.

    Args:
        config: The model, the data, the run's folder and the settings.

    Returns:
        The result of the run; the folder holds more.

    Raises:
        ValueError: If settings, data and model are wrong or do not fit, if `out` is not
            empty or in use by another run, or if the resumed run had other settings.
        FloatingPointError: If loss or gradient are not finite and `on_nan` is "stop".
        OSError: If the disk is full. The last complete state stays.
        ImportError: If a library of the extra `train` is not installed.
        KeyboardInterrupt: At SIGINT, once the state after the step is saved.
        SystemExit: At SIGTERM, likewise.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> data = pathlib.Path(model) / "rows.jsonl"
        >>> _ = data.write_text('{"text": "five"}')
        >>> config = cli.TrainConfig(model, str(data), model + "/run", steps=2)
        >>> result = cli.train(config)
        >>> result.steps, pathlib.Path(result.adapter).name
        (2, 'adapter')
    """
    start(config)
    folder = pathlib.Path(config.out)
    with only_in_first(run_folder(config.out, config.resume)), quiet_orbax():
        check_shared(folder)
        today = agree(datetime.date.today().isoformat())
        with all_or_none():
            run = make_run(config, today)
        data, steps = run.data, run.config.steps
        tell(
            f"{len(data.train):,} rows of {data.kind} and {len(data.valid):,} for "
            f"validation; {data.trained_share:.1%} of the tokens are trained; "
            f"{steps:,} steps",
            *data.notes,
        )
        with ql.train.Checkpoints(folder / STATE, keep=config.keep) as states:
            after = _check_state(run, states)
            with all_or_none():
                if is_first():
                    write_settings(run.config, folder / CONFIG)
            with open_loggers(run, after) as watch:
                model = run.model.read(
                    dtype=jnp.dtype(config.dtype),
                    packing=run.packing,
                    place=lambda base: run.place(base, {})[0],
                    progress=is_first(),
                )
                with nullcontext() if run.mesh is None else set_mesh(run.mesh):
                    state, kept = _fit(run, states, model.base, after, watch)
                    result = finish(run, model.base, state, kept)
        if is_first() and config.push_to_hub is not None:
            tell(f"pushed to {push(config.push_to_hub, folder / 'adapter')}")
        return result


def _check_state(run: Run, states: "ql.train.Checkpoints") -> int | None:
    """Returns the step to resume after; None for a new run. Refuses other settings."""
    config, after = run.config, run.config.resume_step
    if after is None:
        after = states.latest
    if after is None:
        if config.resume:
            tell(
                f"{config.out} holds no state: the run begins again at step 0, and "
                f"{METRICS} with it"
            )
        return None
    saved = states.about(after)["settings"]
    with all_or_none():
        check_stamp(saved, run.stamp, config.out)
    later = "; states of later steps are deleted" * (states.latest != after)
    tell(f"going on after step {after:,} of {config.steps:,}{later}")
    return after


def _fit(
    run: Run,
    states: "ql.train.Checkpoints",
    base: Any,
    after: int | None,
    watch: Callable[[Mapping[str, Any]], None],
) -> tuple["ql.train.State", Mapping[str, float]]:
    """Trains to the end or a signal; returns the state, and numbers of the best one."""
    config, best = run.config, ql.train.Best() if run.config.keep_best else None
    lora = _make_adapters(run, base, jax.random.key(config.seed))
    program = make_program(config, run.model.config)
    state = ql.train.State.create(lora, program.optimizer, config.seed)
    data = make_batches(config, run.data)
    if after is not None:
        state, about = states.restore(state, after)
        data.set_state(about["position"])
        states.remove_after(after)
        if best is not None and (found := about.get("best", {})):
            if found["step"] in (None, *states.steps):
                best = ql.train.Best(**found)
            else:
                tell(f"the best state, of step {found['step']:,}, is no longer there")
    loop = ql.train.Loop(
        steps=config.steps or 0,
        schedule=make_schedule(config),
        accumulation=config.accumulation,
        save_every=config.save_every,
        eval_every=config.eval_steps,
        patience=config.early_stopping_patience,
        on_nan=config.on_nan,
        stamp={"settings": run.stamp},
    )
    step, put = program.step, make_put(run.mesh)
    evaluate = Evaluation(run, program) if run.data.valid else None
    with _metrics(run.folder, after) as metrics, catch_signals() as stop:
        state = ql.train.fit(
            loop,
            lambda state, base, batches: step(state, base, [*map(put, batches)]),
            state,
            base,
            data,
            states=states,
            metrics=metrics,
            evaluate=evaluate,
            best=best,
            watch=watch,
            stop=stop.is_due,
        )
    if stop.number and int(state.step) < loop.steps:
        tell(
            f"the state of step {int(state.step):,} is in {run.folder / STATE}; go on "
            f"by: qlora-jax train --config {shlex.quote(str(run.folder / CONFIG))} "
            "--resume"
        )
        stop.end()
    if best is None or evaluate is None or best.step is None:
        return state, {}
    kept, _ = states.restore(state, best.step)
    found = {"best_step": best.step}
    if best.step < loop.steps:
        found |= evaluate(base, kept, is_end=True)
    return state._replace(lora=kept.lora), found


def _make_adapters(run: Run, base: Any, key: Any) -> Any:
    key = jax.random.fold_in(key, 0)
    add = lambda base: ql.init(key, base, run.adapters)[1]
    if run.mesh is None:
        return add(base)
    _, placed = run.place(base, jax.eval_shape(add, base))
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    return jax.jit(add, out_shardings=shardings)(base)  # each device its part


def _metrics(folder: pathlib.Path, after: int | None) -> Any:
    """Opens the metrics, which only the first process writes."""
    if is_first():
        return ql.train.Metrics(folder / METRICS, after=after)
    return nullcontext(SimpleNamespace(write=lambda **row: None))
