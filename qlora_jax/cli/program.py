"""The program that `qlora-jax train` compiles, from settings and a model's config."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding, set_mesh

import qlora_jax as ql

from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from .devices import make_mesh, make_place, row_axes
from .model import Model, adapters_for, packing_for
from .schedule import make_schedule
from .train_config import TrainConfig


@dataclass(frozen=True)
class Program:
    """What a run computes.

    Attributes:
        model: The wrapped decoder.
        loss: From `ql.train.decoder_loss`.
        optimizer: The optimizer.
        step: From `ql.train.make_step`.
    """

    model: Any
    loss: Any
    optimizer: Any
    step: "ql.train.Step"


def make_program(
    config: TrainConfig,
    decoder: DecoderConfig,
    backend: str | Sequence[str] | None = None,
) -> Program:
    """Returns what a run computes.

    Args:
        config: The settings, all of them given.
        decoder: The model's config.
        backend: As in `ql.matmul`; by default that of the process's devices.
    """
    module = Decoder(
        decoder,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        attention=config.attention,
        stream_dtype=jnp.dtype(config.stream_dtype),
        mlp_tile=config.mlp_tile,
    )
    model = ql.linen.wrap(module, scanned=module.scanned, backend=backend)
    optimizer = ql.train.make_optimizer(
        config.optimizer,
        make_schedule(config),
        clip=config.clip or None,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        offload=config.offload_optimizer,
    )
    loss = ql.train.decoder_loss(model)
    return Program(model, loss, optimizer, ql.train.make_step(loss, optimizer))


def lower_step(
    config: TrainConfig,
    model: Model,
    devices: Sequence[Any],
    backend: str | Sequence[str] | None = None,
) -> jax.stages.Lowered:
    """Lowers a run's step from shapes alone: no weight is made.

    The batch has `batch_size` rows of `max_length` tokens, all trained.

    Args:
        config: The settings, all of them given.
        model: The model; its parameters are shapes.
        devices: The devices, which may be those of `jax.experimental.topologies`.
        backend: As in `make_program`. For devices that this process does not have, the
            kernel for their chip must be named.
    """
    mesh = make_mesh(config.mesh_sizes, devices)
    place = make_place(model.config, mesh, config.base_memory, devices[:1])
    base = _base_shapes(config, model)
    key, adapters = jax.random.key(config.seed), adapters_for(config, model)
    add = lambda base: ql.init(key, base, adapters)[1]
    base, lora = place(base, jax.eval_shape(add, base))
    rows = whole = SingleDeviceSharding(devices[0])
    if mesh is not None:
        axes = PartitionSpec(tuple(row_axes(mesh)) or None)
        rows, whole = NamedSharding(mesh, axes), NamedSharding(mesh, PartitionSpec())
    base, lora = jax.tree.map(lambda x: _at(x, whole), (base, lora))
    program = make_program(config, model.config, backend)
    state = ql.train.State.shapes(lora, program.optimizer)
    shape = config.batch_size, config.max_length
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    arrays: Any = (*[ids] * 5, weights)
    with nullcontext() if mesh is None else set_mesh(mesh):
        return program.step.lower(state, base, ql.train.Batch(*arrays))


def _base_shapes(config: TrainConfig, model: Model) -> Any:
    """Returns the shapes of the parameters as they are read."""
    dtype = jnp.dtype(config.dtype)
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.base)
    packing = packing_for(model, config.fmt, config.block_size, config.double_quant)
    if packing is None:
        return base
    return jax.eval_shape(lambda base: ql.quantize(base, packing), base)


def _at(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    own = x.sharding or sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)
