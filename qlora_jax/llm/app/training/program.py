"""Builds the program of a training step, and places its arguments on a mesh."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
    set_mesh,
)
from jax.typing import DTypeLike
from jaxtyping import PyTree

import qlora_jax as ql

from ...data.batching import Batch
from ...models.constraints import ROW_AXES
from ...train import optimizer as optimizers
from ...train.arrays import put_rows
from ...train.loss_scale import LossScale
from ...train.objectives import find_objective
from ...train.step import State, Step, make_step
from ..adapters import init_shapes, lora_config_for, packing_config_for
from ..environment import fastest_dtype
from ..open_model import Engine, OpenModel
from ..train_config import TrainConfig


class Program(NamedTuple):
    """The model of a run, and the functions that train and evaluate it."""

    model: Any  # a `Decoder` wrapped by `ql.linen.wrap`, or a `TorchDecoder`
    # A `Loss`, as `make_step` takes it, but without the term that balances experts.
    eval_loss: Callable[..., tuple]
    optimizer: optax.GradientTransformation
    step: Step


def make_program(
    config: TrainConfig,
    engine: Engine,
    teacher: Engine | None = None,
    backend: str | Sequence[str] | None = None,
) -> Program:
    """Returns the model, loss, optimizer and step; `backend` is as in `ql.matmul`."""
    model_options: dict[str, Any] = dict(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        attention=config.attention,
        stream_dtype=jnp.dtype(config.stream_dtype),
        mlp_tile=config.mlp_tile,
        has_dropout=config.lora_dropout > 0,
        has_packed_rows=config.packing,
        backend=backend,
    )
    model = engine.make_model(**model_options)
    # The weight of the loss that balances the load of the experts in training.
    balance = 0.0 if engine.experts is None else engine.experts.balance
    objective = find_objective(config.objective)
    if balance and not objective.balances_experts:
        raise ValueError(
            "`output_router_logits` in config.json must be false for preferences, "
            "because their losses do not include the loss that balances experts. Got "
            f"`objective` {config.objective!r}."
        )
    options = config.to_settings()
    settings = {name: options[name] for name in objective.settings}
    if teacher is not None:
        settings["teacher"] = teacher.make_model(**model_options)
    eval_loss = loss = objective.loss(model, **settings)
    if balance:
        loss = objective.loss(model, balance=balance, **settings)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        make_schedule(config),
        clip=config.clip or None,  # 0 turns clipping off
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        offload=config.offload_optimizer,
    )
    return Program(model, eval_loss, optimizer, make_step(loss, optimizer))


def resolve_dtype(dtype: str, platform: str) -> str:
    """Returns `dtype`, or if it is "auto", the fastest dtype on a platform of JAX."""
    return fastest_dtype(platform) if dtype == "auto" else dtype


def make_schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the step."""
    return optimizers.make_schedule(
        config.schedule,
        config.learning_rate,
        config.steps or 1,  # None if `make_run` has not completed the settings
        warmup=config.warmup or 0,
    )


def make_loss_scale(dtype: str) -> LossScale | None:
    """Returns the loss scale before the first step; None unless `dtype` is float16."""
    return LossScale.create() if dtype == "float16" else None


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh | None:
    """Returns a mesh of all devices; None if there are no sizes."""
    if not sizes:
        return None
    if (count := math.prod(sizes.values())) != len(devices):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"`mesh` must have {len(devices)} devices, which is the number available. "
            f"Got {count}: {text}."
        )
    return _make_auto_mesh(sizes, devices)


def _make_auto_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None) -> Mesh:
    types = (AxisType.Auto,) * len(sizes)
    shape, axes = (*sizes.values(),), (*sizes,)
    return jax.make_mesh(shape, axes, axis_types=types, devices=devices)


def make_placer(
    engine: Engine,
    mesh: Mesh | None,
    memory: Literal["device", "host"],
    devices: Sequence[Any] | None = None,
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """Returns a function that puts a base and a lora tree on the mesh or the device."""
    if mesh is None and memory == "device":
        return lambda base, lora: (base, lora)  # already on the device
    # Arrays in host memory need shardings, so a single device gets a mesh of its own.
    target_mesh = mesh or _make_auto_mesh({ROW_AXES[0]: 1}, devices)

    def place(base: PyTree, lora: PyTree) -> tuple[PyTree, PyTree]:
        arguments = engine.place_arguments(base, target_mesh)
        return ql.sharding.place(base, lora, target_mesh, memory=memory, **arguments)

    return place


def make_batch_placer(mesh: Mesh | None) -> Callable[[PyTree], PyTree]:
    """Returns a function that puts a batch on the mesh, split by rows.

    Each process has the full batch, so the number of processes does not change results.
    """
    if mesh is None:
        return lambda batch: batch
    return lambda batch: put_rows(batch, mesh, _row_axes(mesh))


def _row_axes(mesh: Mesh) -> list[str]:
    return [name for name in ROW_AXES if name in mesh.axis_names]


def lower_step(
    config: TrainConfig,
    model: OpenModel,
    devices: Sequence[Any],
    backend: str | Sequence[str] | None = None,
) -> jax.stages.Lowered:
    """Lowers a run's step from shapes only, for a batch of `[batch_size, max_length]`.

    With preferences, the batch has twice as many rows: two sequences for each row of
    data. All its tokens are targets. If the devices are from
    `jax.experimental.topologies`, `backend` must be set.
    """
    mesh = make_mesh(config.mesh_sizes, devices)
    place = make_placer(model.engine, mesh, config.base_memory, devices[:1])
    # The shapes and shardings of the base and the adapters.
    dtype = resolve_dtype(config.dtype, devices[0].platform)
    config = config.replace(dtype=dtype)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.base)
    packing_config = packing_config_for(config, model, "nf4")
    if packing_config is not None:
        base, _ = init_shapes(base, packing_config)
    lora_config = lora_config_for(config, model, packing_config)
    base, lora = place(*init_shapes(base, lora_config))
    row_sharding = replicated = SingleDeviceSharding(devices[0])
    if mesh is not None:
        axes = PartitionSpec(tuple(_row_axes(mesh)) or None)
        row_sharding = NamedSharding(mesh, axes)
        replicated = NamedSharding(mesh, PartitionSpec())
    base, lora = jax.tree.map(
        lambda x: x if x.sharding else x.update(sharding=replicated), (base, lora)
    )
    # The program, and the shapes of its state and of a batch.
    program = make_program(config, model.engine, backend=backend)
    state = State.shapes(lora, program.optimizer, make_loss_scale(dtype))
    num_sequences = find_objective(config.objective).sequences_per_row
    num_rows = config.batch_size * num_sequences
    width = config.max_length

    def batch_array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding)

    integers = ("ids", "segment_ids", "positions", "select", "targets")
    arrays: dict[str, Any] = dict.fromkeys(
        integers, batch_array(jnp.int32, num_rows, width)
    )
    arrays["weights"] = batch_array(jnp.float32, num_rows, width)
    if num_sequences > 1:
        arrays["answers"] = batch_array(jnp.float32, num_rows, 1, width)
    with nullcontext() if mesh is None else set_mesh(mesh):
        return program.step.lower(state, base, Batch(**arrays))
