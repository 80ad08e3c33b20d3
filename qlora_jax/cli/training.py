"""`qlora-jax train`: fine-tunes a model on data."""

import contextlib
import datetime
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import set_mesh

import qlora_jax as ql

from .devices import make_place, make_put
from .evaluation import Evaluation, eval_every
from .model import read
from .orbax_log import quiet_orbax
from .plan import Plan, check_stamp, make_plan
from .processes import (
    Silent,
    agree,
    all_or_none,
    check_shared,
    is_first,
    only_in_first,
    start,
)
from .program import make_program
from .run_folder import CONFIG, METRICS, STATE, run_folder, write_config
from .run_results import TrainResult, finish
from .schedule import make_schedule
from .stopping import catch_signals
from .train_config import TrainConfig


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes a model on data, and writes an adapter that PEFT loads.

    All that can be checked is checked before the model is read: the settings, the data,
    the names of modules, the folder, and with `resume` that they are those of the run.

    Args:
        config: The model, the data, the run's folder and the rest.

    Returns:
        What the run came to; the folder holds more.

    Raises:
        ValueError: If settings, data and model are wrong or do not fit, if `out` is not
            empty or another run is in it, or if the run to go on with had other
            settings.
        FloatingPointError: If loss or gradient are not finite and `on_nan` is "stop".
        OSError: If the disk is full. The last whole state stays.
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
            plan = make_plan(config, today)
        if is_first():
            _tell(plan)
        with ql.train.Checkpoints(folder / STATE, keep=plan.config.keep) as states:
            after = _check_state(plan, states)
            with all_or_none():
                if is_first():
                    write_config(plan.config, folder / CONFIG)
            base = _read(plan)
            with nullcontext() if plan.mesh is None else set_mesh(plan.mesh):
                return _run(plan, folder, states, base, after)


def _check_state(plan: Plan, states: "ql.train.Checkpoints") -> int | None:
    """Returns the step that the run goes on from, and says so; None for a new run.

    Raises:
        ValueError: If the state is damaged, or that of a run of other settings.
    """
    config, after = plan.config, plan.config.resume_step
    if after is None:
        after = states.latest
    if after is None:
        if config.resume and is_first():
            print(
                f"{config.out} holds no state: the run begins again at step 0, and "
                f"{METRICS} with it",
                file=sys.stderr,
            )
        return None
    saved = states.about(after)["settings"]
    with all_or_none():
        check_stamp(saved, plan.stamp, config.out)
    if is_first():
        line = f"going on after step {after:,} of {config.steps:,}"
        if states.latest != after:
            line += "; states of later steps are deleted"
        print(line, file=sys.stderr)
    return after


def _read(plan: Plan) -> Any:
    place = make_place(plan.decoder, plan.mesh, plan.config.base_memory)
    return read(
        plan.model,
        dtype=jnp.dtype(plan.config.dtype),
        packing=plan.packing,
        place=lambda base: place(base, {})[0],
        progress=is_first(),
    ).base


def _run(
    plan: Plan,
    folder: pathlib.Path,
    states: "ql.train.Checkpoints",
    base: Any,
    after: int | None,
) -> TrainResult:
    config = plan.config
    lora = _make_adapters(plan, base)
    program = make_program(config, plan.decoder)
    state = ql.train.State.create(lora, program.optimizer, config.seed)
    data = _make_batches(plan)
    if after is not None:
        state, about = states.restore(state, after)
        data.set_state(about["position"])
        states.remove_after(after)
    loop = ql.train.Loop(
        steps=config.steps or 0,
        schedule=make_schedule(config),
        accumulation=config.accumulation,
        save_every=config.save_every,
        eval_every=eval_every(config),
        on_nan=config.on_nan,
        stamp={"settings": plan.stamp},
    )
    step, put = program.step, make_put(plan.mesh)
    evaluate = None
    if plan.data.valid:
        evaluate = Evaluation(plan, program.model, program.loss, folder)
    with (
        _metrics(folder, after) as metrics,
        _tensorboard(config, folder, after) as watch,
        catch_signals() as stop,
    ):
        state = ql.train.fit(
            loop,
            lambda state, base, batches: step(state, base, [*map(put, batches)]),
            state,
            base,
            data,
            states=states,
            metrics=metrics,
            evaluate=evaluate,
            watch=watch,
            stop=stop.is_due,
        )
    if int(state.step) < loop.steps:
        _tell_how_to_go_on(folder, int(state.step))
        stop.end()
    return finish(plan, folder, base, state)


def _tell_how_to_go_on(folder: pathlib.Path, step: int) -> None:
    if is_first():
        print(
            f"the state of step {step:,} is in {folder / STATE}; go on by: qlora-jax "
            f"train --config {shlex.quote(str(folder / CONFIG))} --resume",
            file=sys.stderr,
        )


def _make_adapters(plan: Plan, base: Any) -> Any:
    key = jax.random.fold_in(jax.random.key(plan.config.seed), 0)
    place = make_place(plan.decoder, plan.mesh, plan.config.base_memory)
    add = lambda base: ql.init(key, base, plan.adapters)[1]
    if plan.mesh is None:
        return add(base)
    _, placed = place(base, jax.eval_shape(add, base))
    shardings = jax.tree.map(lambda x: x.sharding, placed)
    return jax.jit(add, out_shardings=shardings)(base)  # each device its part


def _metrics(folder: pathlib.Path, after: int | None) -> Any:
    return ql.train.Metrics(folder / METRICS, after=after) if is_first() else Silent()


def _tell(plan: Plan) -> None:
    """Says on stderr what was found in the data, before the model is read."""
    data, lines = plan.data, list(plan.data.notes)
    lines.insert(
        0,
        f"{len(data.train):,} rows of {data.kind} and {len(data.valid):,} for "
        f"validation; {data.trained_share:.1%} of the tokens are trained; "
        f"{plan.config.steps:,} steps",
    )
    for line in lines:
        print(line, file=sys.stderr)


def _make_batches(plan: Plan) -> Any:
    config = plan.config
    return ql.train.batches(
        plan.data.train,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=config.seed,
        packing=config.packing,
    )


@contextlib.contextmanager
def _tensorboard(
    config: TrainConfig, folder: pathlib.Path, after: int | None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives what writes a step's numbers for TensorBoard, if that is to be."""
    if not (config.tensorboard and is_first()):
        yield lambda row: None
        return
    from tensorboardX import SummaryWriter

    purge = None if after is None else after + 1
    with SummaryWriter(str(folder / "tensorboard"), purge_step=purge) as writer:

        def watch(row: Mapping[str, Any]) -> None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    writer.add_scalar(name, value, row["step"])

        yield watch
