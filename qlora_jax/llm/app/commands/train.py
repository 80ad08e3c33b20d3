"""`qlora-jax train`: fine-tunes a model on data."""

import contextlib
import datetime
import pathlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax
from jax.sharding import set_mesh
from jaxtyping import PyTree

import qlora_jax as ql

from ...data.batching import Batch
from ...reading import reading
from ...train.callbacks import (
    Best,
    CheckFinite,
    Evaluate,
    LogRows,
    SaveStates,
    ShowProgress,
)
from ...train.checkpoints import Checkpoints
from ...train.loop import Callback, fit
from ...train.outputs import Metrics, plural
from ...train.step import Report, State
from .. import processes
from ..adapters import copy_weights
from ..processes import all_or_none, broadcast_text, is_first, log, only_in_first
from ..run_folder import METRICS, STATE, open_run_folder, quiet_orbax, write_run_config
from ..train_config import TrainConfig
from ..training.evaluation import Evaluation
from ..training.loggers import LogRow, open_loggers
from ..training.preview import Preview, preview
from ..training.program import (
    make_batch_placer,
    make_loss_scale,
    make_placer,
    make_program,
    make_schedule,
)
from ..training.results import TrainResult, write_results
from ..training.resuming import find_resumed_step
from ..training.run import Run, make_batches, make_run

if TYPE_CHECKING:
    import grain


def train(config: TrainConfig) -> TrainResult | Preview:
    """Fine-tunes a model on data, and writes an adapter that PEFT loads.

    Everything is checked before the weights of the model are read: the settings, the
    data, the names of modules and the folder. With `resume`, it is also checked that
    the settings are still those of the run.

    Args:
        config: The model, the data and the settings of the run.

    Returns:
        The result of the run. With `preview`, the rows to show.

    Raises:
        ValueError: If settings, data or model are wrong or incompatible, if `out` is
            not empty or is in use by another run, or if the resumed run had other
            settings.
        FloatingPointError: If a loss or gradient is not finite and `on_nan` is "stop".
        OSError: If the disk is full. The last complete state remains.
        KeyboardInterrupt: At SIGINT, once the current step has ended and its state is
            saved.
        SystemExit: At SIGTERM, also once that state is saved.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> data = pathlib.Path(model) / "rows.jsonl"
        >>> _ = data.write_text('{"text": "five"}')
        >>> settings = dict(model=model, data=str(data), out=model + "/run", steps=2)
        >>> config = app.TrainConfig.from_settings(settings)
        >>> result = app.train(config)
        >>> result.steps, pathlib.Path(result.adapter).name
        (2, 'adapter')
    """
    processes.start_distributed(config)
    if config.preview is not None:
        return _preview(config)
    with contextlib.ExitStack() as stack:
        # 1. Open: the folder is locked, and everything is checked before it is written.
        folder = open_run_folder(config.out, config.resume)
        stack.enter_context(only_in_first(folder))
        stack.enter_context(quiet_orbax())
        processes.check_shared(pathlib.Path(config.out))
        # Processes may start on different days, so they use the date of the first one.
        today = broadcast_text(datetime.date.today().isoformat())
        with all_or_none():
            run = make_run(config, today)
        config = run.config  # with the settings that the model and the data decide
        _log_data(run)
        checkpoints = Checkpoints(run.folder / STATE)
        stack.enter_context(checkpoints)
        resume_after = find_resumed_step(config, run.fingerprint, checkpoints)
        with all_or_none():
            if is_first():
                write_run_config(config, run.model.source, run.data.system)
        log_row = stack.enter_context(open_loggers(run, resume_after))
        # 2. Prepare: the weights are read, and the adapters and the program are made.
        base, teacher = _read_weights(run)
        if run.mesh is not None:  # some functions ask JAX for the current mesh
            stack.enter_context(set_mesh(run.mesh))
        program = make_program(
            config, run.model.engine, run.teacher and run.teacher.engine
        )
        # The second argument of a loss, which gets no gradient.
        frozen = base if teacher is None else (base, teacher)
        evaluation = Evaluation(run, program, base, frozen) if run.data.valid else None
        batches = make_batches(config, run.data)
        state = _init_state(run, base, program.optimizer)
        best = Best() if config.keep_best else None
        if resume_after is not None:
            state, best = _restore(run, checkpoints, resume_after, state, batches)
            checkpoints.remove_after(resume_after)  # the run writes them again
        # 3. Fit.
        put_batch = make_batch_placer(run.mesh)

        def take_step(state: State, batches: Sequence[Batch]) -> tuple[State, Report]:
            return program.step(state, frozen, [*map(put_batch, batches)])

        with processes.catch_signals() as stop, contextlib.ExitStack() as files:
            callbacks = _open_callbacks(
                run, checkpoints, evaluation, best, log_row, resume_after, files
            )
            state = fit(
                state,
                take_step,
                batches,
                steps=config.steps or 0,
                accumulation=config.accumulation,
                schedule=make_schedule(config),
                callbacks=[*callbacks, stop],
            )
        if stop.is_due():  # a signal may have arrived after the last check
            _end_at_signal(stop, int(state.step), config)
        # 4. Write.
        best_metrics = {}
        if best is not None and best.step is not None and evaluation is not None:
            state, best_metrics = _choose_best(
                run, checkpoints, evaluation, best, state
            )
        result = write_results(run, base, teacher, state, best_metrics)
    return result


def _preview(config: TrainConfig) -> Preview:
    """Returns the first rows of a run, and writes nothing."""
    # A preview leaves out the loggers, so it needs no account.
    config = config.replace(log=[])
    with all_or_none():
        run = make_run(config, datetime.date.today().isoformat())
    _log_data(run)
    return preview(run)


def _log_data(run: Run) -> None:
    data = run.data
    if run.model.is_local:  # otherwise, `open_model` has already printed this
        log(f"weights: {run.model.source}")
    log(
        f"{plural(len(data.train), 'row')} of {data.kind} and {len(data.valid):,} "
        f"for validation; {data.trained_share:.1%} of the tokens are trained; "
        f"{plural(run.config.steps or 0, 'step')}",
        *data.notes,
    )


def _read_weights(run: Run) -> tuple[PyTree, PyTree | None]:
    """Returns the base, and the teacher's weights if there is a teacher."""
    dtype = jnp.dtype(run.config.dtype)
    base = run.model.read(
        dtype=dtype,
        packing_config=run.packing_config,
        place=lambda base: run.place(base, {})[0],  # places the base alone
        progress=is_first(),
    ).base
    if run.teacher is None:
        return base, None
    place = make_placer(run.teacher.engine, run.mesh, "device")
    # In float, unless the teacher's files have 4 bits.
    teacher = run.teacher.read(
        dtype=dtype, place=lambda base: place(base, {})[0], progress=is_first()
    )
    return base, teacher.base


def _init_state(
    run: Run, base: PyTree, optimizer: optax.GradientTransformation
) -> State:
    """Returns the state before the first step."""
    seed = run.config.seed
    key = jax.random.fold_in(jax.random.key(seed), 0)  # not a key of dropout

    def init_adapters(base: PyTree, initial_lora: PyTree | None) -> PyTree:
        lora = ql.init(key, base, run.lora_config)[1]
        return lora if initial_lora is None else copy_weights(lora, initial_lora)

    if run.mesh is not None:
        # Compiled with the final shardings, so that a device computes only its part.
        shapes = jax.eval_shape(init_adapters, base, run.initial_lora)
        _, placed = run.place(base, shapes)
        shardings = jax.tree.map(lambda x: x.sharding, placed)
        init_adapters = jax.jit(init_adapters, out_shardings=shardings)
    lora = init_adapters(base, run.initial_lora)
    return State.create(lora, optimizer, seed, make_loss_scale(run.config.dtype))


def _restore(
    run: Run,
    checkpoints: Checkpoints,
    step: int,
    state: State,
    batches: "grain.DatasetIterator[Batch]",
) -> tuple[State, Best | None]:
    """Returns the state of a step, and the best step until then.

    `batches` moves to the position that was saved with the state.
    """
    with reading(run.folder / STATE / str(step)):
        state, metadata = checkpoints.restore(state, step)
        batches.set_state(metadata["position"])
        best = Best(**metadata.get("best", {}))
    if not run.config.keep_best:
        return state, None
    if best.step not in (None, *checkpoints.steps):
        log(f"The best state, of step {best.step:,}, no longer exists.")
        best = Best()
    return state, best


def _open_callbacks(
    run: Run,
    checkpoints: Checkpoints,
    evaluation: Evaluation | None,
    best: Best | None,
    log_row: LogRow,
    resume_after: int | None,
    stack: contextlib.ExitStack,
) -> list[Callback]:
    """Returns the callbacks of a run, whose files `stack` closes.

    They are called in this order: the metrics of a step are written before its state is
    saved.
    """
    config, metrics = run.config, None
    if is_first():
        metrics = Metrics(run.folder / METRICS, after=resume_after)
        stack.enter_context(metrics)
    callbacks: list[Callback] = [CheckFinite(checkpoints, metrics, config.on_nan)]
    if evaluation is not None:
        patience, on_start = config.patience, config.eval_on_start
        callbacks.append(
            Evaluate(evaluation, config.eval_steps, best, patience, on_start)
        )
    if metrics is not None:
        callbacks.append(metrics)
    return [
        *callbacks,
        LogRows(log_row),
        stack.enter_context(ShowProgress()),
        SaveStates(checkpoints, config.save_every, {"settings": run.fingerprint}, best),
    ]


def _choose_best(
    run: Run, checkpoints: Checkpoints, evaluation: Evaluation, best: Best, last: State
) -> tuple[State, dict[str, float]]:
    """Returns the last state with the best adapter, and the best adapter's metrics."""
    assert best.step is not None
    steps = run.config.steps or 0
    if int(last.step) < steps:
        log(
            f"The validation loss of {run.folder} has not fallen in "
            f"{plural(best.since, 'evaluation')}. Stopped after step "
            f"{int(last.step):,}."
        )
    best_state, _ = checkpoints.restore(last, best.step)
    # If the last step is the best, its evaluation is in the last row of metrics.
    metrics: dict[str, float] = {"best_step": best.step}
    if best.step < steps:
        metrics |= evaluation(best_state, is_full=True)
    return last._replace(lora=best_state.lora), metrics


def _end_at_signal(
    stop: processes.StopAtSignal, step: int, config: TrainConfig
) -> None:
    """Prints how to resume the run, and raises the exception of the signal."""
    folder = pathlib.Path(config.out)
    command = (
        f"qlora-jax train --config {shlex.quote(f'{folder}/config.yaml')} --resume"
    )
    # The file has all settings of the run but this one, which differs by process.
    if isinstance(config.distributed, str):
        address, count, _ = config.distributed.split(",")
        command += f" --distributed {address},{count},INDEX, in each process"
    log(
        f"The state of step {step:,} is saved in {folder / STATE}. To resume: {command}"
    )
    stop.raise_exception()
