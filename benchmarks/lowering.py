"""Lowers the training step of a run from shapes, for compilers without a device."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding, set_mesh
from jax.typing import DTypeLike

from qlora_jax.llm.app.adapters import init_shapes, lora_config_for, packing_config_for
from qlora_jax.llm.app.open_model import OpenModel
from qlora_jax.llm.app.train_config import TrainConfig
from qlora_jax.llm.app.training.program import (
    make_loss_scale,
    make_mesh,
    make_placer,
    make_program,
    resolve_dtype,
)
from qlora_jax.llm.data import Batch
from qlora_jax.llm.models.constraints import ROW_AXES
from qlora_jax.llm.train import State, find_objective


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
        axes = PartitionSpec(tuple(x for x in ROW_AXES if x in mesh.axis_names) or None)
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
