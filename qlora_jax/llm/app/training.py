"""`qlora-jax train`: fine-tunes a model on data."""

import contextlib
import datetime
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import set_mesh
from jaxtyping import PyTree

import qlora_jax as ql

from ..data.batching import Batch
from ..reading import reading
from ..train.callbacks import (
    Best,
    CheckFinite,
    Evaluate,
    ForMembers,
    LogRows,
    SaveStates,
    ShowProgress,
)
from ..train.checkpoints import Checkpoints
from ..train.loop import Callback, fit
from ..train.outputs import Metrics, plural
from ..train.step import Report, State
from . import processes
from .evaluation import Evaluation
from .loggers import LogRow, open_loggers
from .preview import Preview, preview
from .processes import all_or_none, broadcast_text, is_first, log, only_in_first
from .program import (
    Program,
    make_batch_placer,
    make_loss_scale,
    make_placer,
    make_program,
    make_schedule,
)
from .pushing import push
from .run import Run, check_stamp, make_batches, make_run, make_sibling, member_configs
from .run_folder import (
    CONFIG,
    METRICS,
    STATE,
    open_run_folder,
    quiet_orbax,
    write_run_config,
)
from .run_results import (
    SweepResult,
    TrainResult,
    note_failure,
    write_results,
    write_sweep_results,
)
from .starting import copy_weights
from .train_config import TrainConfig

if TYPE_CHECKING:
    import grain

# The state with the adapter that a run writes, and the `best_metrics` of
# `write_results`.
Outcome = tuple[State, Mapping[str, float]]


def train(config: TrainConfig) -> TrainResult | SweepResult | Preview:
    """Fine-tunes a model on data, and writes an adapter that PEFT loads.

    Everything is checked before the weights of the model are read: the settings, the
    data, the names of modules and the folder. With `resume`, it is also checked that
    the settings are still those of the run.

    Args:
        config: The model, the data and the settings of the run.

    Returns:
        The result of the run, or of a sweep over learning rates or seeds whose runs are
        trained side by side. With `preview`, the rows to show.

    Raises:
        ValueError: If settings, data or model are wrong or incompatible, if `out` is
            not empty or is in use by another run, or if the resumed run had other
            settings.
        FloatingPointError: If a loss or gradient is not finite and `on_nan` is "stop".
        OSError: If the disk is full. The last complete state remains.
        ImportError: If a library of the extra `train`, or a logger in `log`, is not
            installed.
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
    folder = pathlib.Path(config.out)
    with contextlib.ExitStack() as stack:
        # The folder is locked and everything is checked before anything is written.
        stack.enter_context(only_in_first(open_run_folder(config.out, config.resume)))
        stack.enter_context(quiet_orbax())
        processes.check_shared(folder)
        runs = _make_runs(config)
        first = runs[0]  # the runs of a sweep have the same model, data and devices
        _log_data(first, len(runs))
        # Each run of a sweep has its own folder and saved states.
        checkpoints = [
            stack.enter_context(Checkpoints(x.folder / STATE, keep=config.keep))
            for x in runs
        ]
        resume_after = _find_resumed_step(runs, checkpoints)
        _write_all_settings(config, runs)
        # The model is read, and all runs are trained over one base.
        log_rows = [stack.enter_context(open_loggers(x, resume_after)) for x in runs]
        model = first.model.read(
            dtype=jnp.dtype(first.config.dtype),
            packing_config=first.packing_config,
            place=lambda base: first.place(base, {})[0],  # places the base alone
            progress=is_first(),
        )
        teacher = _read_teacher(first)
        if first.mesh is not None:  # some functions ask JAX for the current mesh
            stack.enter_context(set_mesh(first.mesh))
        outcomes = _fit(
            config, runs, checkpoints, model.base, teacher, resume_after, log_rows
        )
        results = [
            outcome and write_results(run, model.base, teacher, *outcome)
            for run, outcome in zip(runs, outcomes, strict=True)
        ]
    result = results[0]
    if config.is_sweep:
        result = write_sweep_results(config, runs, results)
    assert result is not None  # without a sweep, a failure raises
    if is_first() and config.push_to_hub is not None:
        if result.adapter is None:
            log("nothing is pushed, because all runs of the sweep have failed")
        else:
            adapter = pathlib.Path(result.adapter)
            log(f"pushed to {push(config.push_to_hub, adapter)}")
    return result


def _read_teacher(run: Run) -> PyTree | None:
    """Returns the teacher's weights, in float unless its file has 4 bits."""
    if run.teacher is None:
        return None
    place = make_placer(run.teacher.engine, run.mesh, "device")
    dtype = jnp.dtype(run.config.dtype)
    teacher = run.teacher.read(
        dtype=dtype, place=lambda base: place(base, {})[0], progress=is_first()
    )
    return teacher.base


def _preview(config: TrainConfig) -> Preview:
    """Returns the first rows of a run, and writes nothing."""
    # A preview leaves out the hub and the loggers, so it needs no account. All runs of
    # a sweep see the same rows, so the first run suffices.
    first_config = member_configs(config.replace(push_to_hub=None, log=[]))[0]
    with all_or_none():
        run = make_run(first_config, datetime.date.today().isoformat())
    _log_data(run, 1)
    return preview(run)


def _make_runs(config: TrainConfig) -> list[Run]:
    # Use the date of the first process, because processes may start on different days.
    today = broadcast_text(datetime.date.today().isoformat())
    with all_or_none():
        first_config, *configs = member_configs(config)
        first = make_run(first_config, today)
        if config.is_sweep and config.push_to_hub and not first.data.valid:
            raise ValueError(
                "`push_to_hub` needs validation rows if several adapters are trained, "
                f"because the best one is pushed. {config.data} has none."
            )
        return [first, *(make_sibling(first, x) for x in configs)]


def _log_data(run: Run, num_adapters: int) -> None:
    data = run.data
    if run.model.is_local:  # otherwise, `open_model` has already printed this
        log(f"weights: {run.model.source}")
    log(
        f"{plural(len(data.train), 'row')} of {data.kind} and {len(data.valid):,} "
        f"for validation; {data.trained_share:.1%} of the tokens are trained; "
        f"{plural(run.config.steps or 0, 'step')}"
        + (f" of {num_adapters} adapters" if num_adapters > 1 else ""),
        *data.notes,
    )


def _find_resumed_step(
    runs: Sequence[Run], checkpoints: Sequence[Checkpoints]
) -> int | None:
    """Returns the step to resume after, or None to start at step 0.

    Raises ValueError if the settings of the runs differ from those saved at that step,
    if it is after the last step, or if finished runs lack their metrics.
    """
    config = runs[0].config
    step, steps = config.resume_step, config.steps or 0
    if step is None:  # the newest state that all runs have
        common_steps = set.intersection(*(set(x.steps) for x in checkpoints))
        step = max(common_steps, default=None)
    if step is None:
        if config.resume:
            missing = f"{config.out} has no saved state"
            if len(runs) > 1:
                folder = runs[0].folder.parent
                missing = f"No step has a saved state of every run in {folder}"
            log(
                f"{missing}. Training starts again at step 0, and overwrites saved "
                f"states and {METRICS}."
            )
        return None
    with reading(f"{runs[0].folder / STATE / str(step)}"):
        saved_stamps = [{**x.metadata(step)["settings"]} for x in checkpoints]
    with all_or_none():
        for run, saved_stamp in zip(runs, saved_stamps, strict=True):
            check_stamp(saved_stamp, run.stamp, run.config.out)
            if step > steps:
                raise ValueError(
                    f"`steps` must be at least {step}, the step from which the run "
                    f"resumes. Got {steps}. Earlier states can be selected with "
                    "`resume_step`."
                )
            if step == steps and not (run.folder / METRICS).is_file():
                raise ValueError(
                    f"{run.folder} must have {METRICS}, from which the results of a "
                    "finished run are written. It is missing."
                )
    is_newest = all(x.latest == step for x in checkpoints)
    note = "" if is_newest else "; later states are deleted"
    log(f"Resuming after step {step:,} of {steps:,}{note}")
    return step


def _write_all_settings(config: TrainConfig, runs: Sequence[Run]) -> None:
    """Writes the settings of each run in its folder, and those of a sweep in `out`."""
    with all_or_none():
        if is_first():
            if config.is_sweep:
                # The swept settings are lists, and the others are as in the runs.
                settings = runs[0].config.replace(out=config.out, **config.sweepable)
                path = pathlib.Path(config.out) / CONFIG
                write_run_config(settings, path, runs[0].model.source, None)
            for run in runs:
                path, source = run.folder / CONFIG, run.model.source
                write_run_config(run.config, path, source, run.data.system)


class Trainer:
    """A run that is trained, alone or together with the other runs of a sweep."""

    def __init__(
        self, run: Run, checkpoints: Checkpoints, evaluation: Evaluation | None
    ):
        """Stores the arguments."""
        self.run, self.checkpoints, self.evaluation = run, checkpoints, evaluation
        self.best = Best() if run.config.keep_best else None
        self.has_failed = False

    def make_state(
        self,
        base: PyTree,
        optimizer: optax.GradientTransformation,
        batches: "grain.DatasetIterator[Batch]",
        resume_after: int | None,
    ) -> State:
        """Returns the state to start from: a new one, or that of step `resume_after`.

        When a run is resumed, `batches` moves to the position that was saved with the
        state, and later states are deleted.
        """
        seed = cast(int, self.run.config.seed)  # one run has one seed
        lora = _init_adapters(self.run, base, jax.random.key(seed))
        loss_scale = make_loss_scale(self.run.config.dtype)
        state = State.create(lora, optimizer, seed, loss_scale)
        if resume_after is None:
            # A sweep that was killed while it saved its first states has some of them.
            self.checkpoints.remove_after(-1)
            return state
        with reading(self.run.folder / STATE / str(resume_after)):
            state, metadata = self.checkpoints.restore(state, resume_after)
            batches.set_state(metadata["position"])
            best = Best(**metadata.get("best", {}))
        self.checkpoints.remove_after(resume_after)  # the run writes them again
        if self.best is not None:
            if best.step in (None, *self.checkpoints.steps):
                self.best = best
            else:
                log(f"The best state, of step {best.step:,}, no longer exists.")
        return state

    def make_callbacks(
        self, metrics: Metrics | None, log_row: LogRow, progress: Sequence[Callback]
    ) -> list[Callback]:
        """Returns the callbacks of the run, in the order in which they are called.

        The metrics of a step are written before its state is saved.
        """
        config, best = self.run.config, self.best
        on_nan, log_every = config.on_nan, config.log_every or 1
        callbacks: list[Callback] = [CheckFinite(self.checkpoints, metrics, on_nan)]
        if self.evaluation is not None:
            evaluate = Evaluate(
                self.evaluation,
                config.eval_steps,
                best,
                config.early_stopping_patience,
                config.eval_on_start,
            )
            callbacks.append(evaluate)
        if metrics is not None:
            callbacks.append(metrics)
        stamp = {"settings": self.run.stamp}
        save = SaveStates(self.checkpoints, config.save_every, stamp, best)
        return [*callbacks, LogRows(log_row, log_every), *progress, save]

    def fail(self, error: FloatingPointError) -> None:
        """Records that the run, which is in a sweep, has failed."""
        self.has_failed = True
        note_failure(self.run, error)

    def choose_adapter(self, last: State) -> Outcome:
        """Returns what `write_results` writes: the last or the best adapter."""
        best, steps = self.best, self.run.config.steps or 0
        if best is None or self.evaluation is None or best.step is None:
            return last, {}
        if int(last.step) < steps:
            log(
                f"The validation loss of {self.run.folder} has not fallen in "
                f"{plural(best.since, 'evaluation')}. Stopped after step "
                f"{int(last.step):,}."
            )
        best_state, _ = self.checkpoints.restore(last, best.step)
        # If the last step is the best, its evaluation is in the last row of metrics.
        metrics: dict[str, float] = {"best_step": best.step}
        if best.step < steps:
            metrics |= self.evaluation(best_state, is_full=True)
        return last._replace(lora=best_state.lora), metrics


def _init_adapters(run: Run, base: PyTree, key: jax.Array) -> PyTree:
    key = jax.random.fold_in(key, 0)  # differs from the keys of dropout

    def init_adapters(base: PyTree, initial_lora: PyTree | None) -> PyTree:
        lora = ql.init(key, base, run.lora_config)[1]
        return lora if initial_lora is None else copy_weights(lora, initial_lora)

    if run.mesh is None:
        return init_adapters(base, run.initial_lora)
    # Compiled with the final shardings, so that each device computes only its part.
    _, placed = run.place(base, jax.eval_shape(init_adapters, base, run.initial_lora))
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    return jax.jit(init_adapters, out_shardings=shardings)(base, run.initial_lora)


def _fit(
    config: TrainConfig,
    runs: list[Run],
    checkpoints: list[Checkpoints],
    base: PyTree,
    teacher: PyTree | None,
    resume_after: int | None,
    log_rows: list[LogRow],
) -> list[Outcome | None]:
    """Trains the runs to their last step, and returns an outcome for each of them.

    The outcome of a run that failed is None. At a signal, an exception is raised once
    the states are saved. The adapters of a sweep take each step together, so the base
    is decoded only once for all of them.
    """
    first, is_sweep = runs[0], config.is_sweep
    steps = first.config.steps or 0
    rates = [cast(float, x.config.learning_rate) for x in runs]
    schedules = [make_schedule(first.config, rate) for rate in rates]
    program = make_program(
        first.config,
        first.model.engine,
        first.teacher and first.teacher.engine,
        learning_rates=rates if is_sweep else None,
    )
    # The second argument of a loss, which gets no gradient.
    frozen = base if teacher is None else (base, teacher)
    trainers = _make_trainers(runs, checkpoints, program, base, frozen)
    batches = make_batches(first.config, first.data)
    states = [
        x.make_state(base, program.optimizer, batches, resume_after) for x in trainers
    ]
    state = State.stack(states) if is_sweep else states[0]
    del states  # in a sweep, `state` is a copy, and these would stay in memory
    put_batch = make_batch_placer(first.mesh)

    def take_step(state: State, batches: Sequence[Batch]) -> tuple[State, Report]:
        return program.step(state, frozen, [*map(put_batch, batches)])

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.catch_signals())
        state = fit(
            state,
            take_step,
            batches,
            steps=steps,
            accumulation=first.config.accumulation,
            schedule=_combine_schedules(schedules) if is_sweep else schedules[0],
            callbacks=[
                *_open_callbacks(trainers, log_rows, resume_after, is_sweep, stack),
                stop,
            ],
        )
    if stop.is_due():  # a signal may have arrived after the last check
        _end_at_signal(stop, int(np.max(state.step)), config)
    return [
        None
        if trainer.has_failed
        else trainer.choose_adapter(state.member(index) if is_sweep else state)
        for index, trainer in enumerate(trainers)
    ]


def _make_trainers(
    runs: Sequence[Run],
    checkpoints: Sequence[Checkpoints],
    program: Program,
    base: PyTree,
    frozen: PyTree,
) -> list[Trainer]:
    evaluation = None
    if runs[0].data.valid:
        evaluation = Evaluation(runs[0], program, base, frozen)
    return [
        Trainer(run, run_checkpoints, evaluation and evaluation.for_run(run))
        for run, run_checkpoints in zip(runs, checkpoints, strict=True)
    ]


def _combine_schedules(schedules: Sequence[Callable[[Any], Any]]) -> Callable:
    """Returns a function from the adapters' numbers of updates to learning rates."""
    return lambda num_updates: [
        schedule(n) for schedule, n in zip(schedules, num_updates, strict=True)
    ]


def _open_callbacks(
    trainers: Sequence[Trainer],
    log_rows: Sequence[LogRow],
    resume_after: int | None,
    is_sweep: bool,
    stack: contextlib.ExitStack,
) -> list[Callback]:
    """Returns the callbacks of all runs. `stack` closes what they open."""
    log_every = trainers[0].run.config.log_every
    progress = [stack.enter_context(ShowProgress(log_every))]
    callbacks = []
    for trainer, log_row in zip(trainers, log_rows, strict=True):
        metrics = None
        if is_first():
            path = trainer.run.folder / METRICS
            metrics = stack.enter_context(Metrics(path, after=resume_after))
        callbacks.append(trainer.make_callbacks(metrics, log_row, progress))
        progress = []  # of the first run only
    if not is_sweep:
        return callbacks[0]
    return [ForMembers(callbacks, lambda index, error: trainers[index].fail(error))]


def _end_at_signal(
    stop: processes.StopAtSignal, step: int, config: TrainConfig
) -> None:
    """Prints how to resume the run, and raises the exception of the signal."""
    out = pathlib.Path(config.out)
    states = out / STATE  # the runs of a sweep have their own ones, in subfolders
    log(
        f"The state of step {step:,} is saved in "
        f"{states if states.is_dir() else out}. To resume: {_resume_command(config)}"
    )
    stop.raise_exception()


def _resume_command(config: TrainConfig) -> str:
    """Returns the command that resumes a run, to be run in each of its processes."""
    file = pathlib.Path(config.out) / CONFIG
    command = f"qlora-jax train --config {shlex.quote(str(file))} --resume"
    # The file has all settings of the run but this one, which differs by process.
    if config.process_id is None:
        return command
    return f"{command} --process_id ID, in each process with its own ID"
