"""`qlora-jax train`: fine-tunes a model on data."""

import contextlib
import dataclasses
import datetime
import pathlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
from jax.sharding import set_mesh

import qlora_jax as ql

from .._jax.progress import plural
from ..train.loop import drive, training
from .evaluation import Evaluation
from .fitting import Fitting, check_states, end_at_signal, open_metrics
from .loggers import open_loggers
from .preview import Preview, preview
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
from .program import make_program, make_put
from .pushing import push
from .run import Run, make_run, run_beside
from .run_folder import CONFIG, STATE, quiet_orbax, run_folder, write_settings
from .run_results import TrainResult, finish
from .sweep import SweepResult, finish_sweep, members_of, note_failure
from .train_config import SWEPT, TrainConfig


def train(config: TrainConfig) -> TrainResult | SweepResult | Preview:
    """Fine-tunes a model on data, and writes an adapter that PEFT loads.

    Settings, data, module names, the folder and (with `resume`) the run's settings are
    checked before the model is read.

    Args:
        config: The model, the data, the run's folder and the settings.

    Returns:
        The result of the run, or of several with other learning rates or seeds, which
        are trained side by side; the folder holds more. With `preview`, the rows that
        it shows.

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
    if config.preview is not None:
        return _preview(config)
    folder, members = pathlib.Path(config.out), members_of(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_in_first(run_folder(config.out, config.resume)))
        stack.enter_context(quiet_orbax())
        check_shared(folder)
        today = agree(datetime.date.today().isoformat())
        with all_or_none():
            first, *others = members
            runs = [make_run(first, today)]
            runs += [run_beside(runs[0], member) for member in others]
        run = runs[0]
        _tell_data(run, len(runs))
        keep = config.keep
        states = [
            stack.enter_context(ql.train.Checkpoints(run.folder / STATE, keep=keep))
            for run in runs
        ]
        after = check_states(runs, states)
        with all_or_none():
            if is_first():
                swept = {name: getattr(config, name) for name in ("out", *SWEPT)}
                resolved = dataclasses.replace(run.config, **swept)
                write_settings(resolved, folder / CONFIG, run.model.source)
                for run in runs:
                    write_settings(run.config, run.folder / CONFIG, run.model.source)
        watches = [stack.enter_context(open_loggers(run, after)) for run in runs]
        model = run.model.read(
            dtype=jnp.dtype(config.dtype),
            packing=run.packing,
            place=lambda base: run.place(base, {})[0],
            progress=is_first(),
        )
        stack.enter_context(nullcontext() if run.mesh is None else set_mesh(run.mesh))
        found = _fit(config, runs, states, model.base, after, watches)
        results = [
            kept and finish(run, model.base, *kept)
            for run, kept in zip(runs, found, strict=True)
        ]
    result = finish_sweep(config, runs, results) if config.is_sweep else results[0]
    if is_first() and config.push_to_hub is not None:
        tell(f"pushed to {push(config.push_to_hub, folder / 'adapter')}")
    return result


def _preview(config: TrainConfig) -> Preview:
    """Returns the first rows of a run, which leaves nothing."""
    first = members_of(dataclasses.replace(config, push_to_hub=None, log=[]))[0]
    with all_or_none():
        run = make_run(first, datetime.date.today().isoformat())
    _tell_data(run, 1)
    return preview(run)


def _tell_data(run: Run, num_adapters: int) -> None:
    data, config = run.data, run.config
    tell(
        *[f"weights: {run.model.source}"] * run.model.is_local,
        f"{plural(len(data.train), 'row')} of {data.kind} and {len(data.valid):,} "
        f"for validation; {data.trained_share:.1%} of the tokens are trained; "
        f"{plural(config.steps or 0, 'step')}"
        + (f" of {num_adapters} adapters" if num_adapters > 1 else ""),
        *data.notes,
    )


def _fit(
    config: TrainConfig,
    runs: list[Run],
    states: list["ql.train.Checkpoints"],
    base: Any,
    after: int | None,
    watches: list[Callable[[Mapping[str, Any]], None]],
) -> list[Any]:
    """Trains to the end or a signal.

    Returns the state of each run, and numbers of its best one; None if it failed.
    """
    run = runs[0]
    programs = [make_program(run.config, run.model.config) for run in runs]
    evaluate = Evaluation(run, programs[0]) if run.data.valid else None
    fittings = [
        Fitting(run, own, base, program, evaluate and evaluate.of(run), after)
        for run, own, program in zip(runs, states, programs, strict=True)
    ]
    optimizers = [program.optimizer for program in programs]
    joint = ql.train.make_joint_step(programs[0].loss, optimizers)
    put = make_put(run.mesh)
    make = lambda states, batches: joint(states, base, [*map(put, batches)])
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(catch_signals())
        steps = []
        for number, (one, watch) in enumerate(zip(fittings, watches, strict=True)):
            metrics = open_metrics(one.run.folder, after)
            generator = training(
                one.loop,
                one.state,
                base,
                one.data,
                states=one.states,
                metrics=stack.enter_context(metrics),
                evaluate=one.evaluate,
                best=one.best,
                watch=watch,
                # All end at one signal, after the same step.
                stop=(lambda: stop.number > 0) if number else stop.is_due,
                progress=not number,
            )
            steps.append(generator)
        note = lambda number, error: note_failure(runs[number], error)
        last = drive(steps, make, note if config.is_sweep else None)
    if stop.is_due():  # perhaps since the last step
        step = max((int(state.step) for state in last if state), default=0)
        end_at_signal(stop, step, pathlib.Path(config.out))
    pairs = zip(fittings, last, strict=True)
    return [state and fitting.kept(state) for fitting, state in pairs]
