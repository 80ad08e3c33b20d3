"""The product under `vmap` and over several devices.

To JAX's partitioner a kernel is opaque, and decoded weights are one more array to
gather. So the product tells by itself who multiplies what (`layout`), where it can:

- with Explicit axes the operands' types say how they lie: a `shard_map`;
- under `shard_map` a device has its parts already;
- in Auto mode only the partitioner knows, and asks: `custom_partitioning`. On TPUs it
  cannot (jax-ml/jax issue 38196), and the product is left to it as plain operations.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    get_abstract_mesh,
    reshard,
    use_abstract_mesh,
)
from jaxtyping import Array

from .._jax.modes import explicit_mesh, in_auto_mode
from .._jax.pytree import take_layer
from .._jax.specs import spec_of
from .backends.reference import Weights
from .choose import by_platform, on_one_device, run_backend
from .layout import Call, lay_out


def partitioned_product(
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array | None,
    *,
    weights: Weights,
    backend: str | None,
    transpose: bool,
    precision: Any,
) -> Array:
    """Returns `x @ W` or `x @ W^T` for x `[*batch, *rows, .]`.

    Codes are `[*batch, ., N]`, or `[L, *batch, ., N]` if there is a layer; scales are
    those of that layer.
    """
    batch = scales.ndim - 2
    rows = x.ndim - 1 - batch
    stacked = layer is not None
    call = Call(weights, batch, rows, stacked, backend, transpose, precision)
    return _compiled(call)(x, codes, scales, *([layer] if stacked else []))


@functools.cache
def _compiled(call: Call) -> Any:
    """The call as one function of arrays; cached, so that it is traced once."""

    @custom_vmap
    def run(*arrays):
        return _over_devices(call, *arrays)

    @run.def_vmap
    def _(size, batched, *arrays):
        return _batched(call, size, batched, *arrays), True

    return run


def _batched(call, size, batched, x, codes, scales, *layer):
    """One more row axis where only x is batched; else one more batch axis."""
    names = "weights", "backend", "transpose", "precision"
    run = functools.partial(
        partitioned_product, **{name: getattr(call, name) for name in names}
    )
    x_batched, codes_batched, scales_batched, *layer_batched = batched
    if not (codes_batched or scales_batched or any(layer_batched)):
        x = jnp.moveaxis(x, 0, call.batch)
        y = run(x, codes, scales, layer[0] if layer else None)
        return jnp.moveaxis(y, call.batch, 0)
    if any(layer_batched):
        # Different layers at once: there is no way but to cut them out.
        axes = (0 if codes_batched else None, 0)
        codes = jax.vmap(take_layer, axes)(codes, layer[0])
        layer, codes_batched = (), True
    at = len(layer)  # behind the axis of layers
    codes = jnp.moveaxis(codes, 0, at) if codes_batched else _repeat(codes, size, at)
    x = x if x_batched else _repeat(x, size, 0)
    scales = scales if scales_batched else _repeat(scales, size, 0)
    return run(x, codes, scales, layer[0] if layer else None)


def _repeat(a, size, axis):
    shape = (*a.shape[:axis], size, *a.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(a, axis), shape)


def _over_devices(call, *arrays):
    """Finds out how the arrays lie, if that is known while tracing."""
    mesh = explicit_mesh(*arrays)
    if mesh is not None:
        return _by_types(call, mesh, *arrays)
    context = get_abstract_mesh()
    if not context.empty and {*context.axis_types} == {AxisType.Manual}:
        return on_one_device(call, *arrays)
    return by_platform(call, *arrays, split=_asked)


def _by_types(call, mesh, *arrays):
    x, codes, scales, *_ = arrays
    sizes = dict(mesh.shape)
    layout = lay_out(call, sizes, spec_of(x), spec_of(codes), scales.shape)
    place = lambda a, spec: reshard(a, NamedSharding(mesh, spec))
    if {*mesh.axis_types} != {AxisType.Explicit}:
        # Types do not tell about the other axes.
        run = functools.partial(by_platform, call, split=_asked)
        return in_auto_mode(run, mesh, layout.result)(*arrays)
    return jax.shard_map(
        layout.on_one(on_one_device),
        mesh=mesh,
        in_specs=layout.operands,
        out_specs=layout.result,
        check_vma=False,
    )(*map(place, arrays, layout.operands))


def _partition(call, mesh, operands, result):
    """What `custom_partitioning` asks while the program compiles."""
    del result
    x, codes, scales, *_ = operands
    sizes = dict(mesh.shape)
    specs = x.sharding.spec, codes.sharding.spec
    layout = lay_out(call, sizes, *specs, scales.shape)
    place = lambda spec: NamedSharding(mesh, spec)

    def lower(*arrays):
        # Whatever mesh was set where the program compiles: one device knows none.
        with use_abstract_mesh(AbstractMesh((), ())):
            return layout.on_one(run_backend)(*arrays)

    return mesh, lower, place(layout.result), tuple(map(place, layout.operands))


def _rule(call, mesh, operands, results):
    """Names axes that are alike, for the partitioner's propagation."""
    del results
    batch = [f"b{i}" for i in range(call.batch)]
    rows = [f"m{i}" for i in range(call.rows)]
    blocks, block_size = operands[2].shape[-2], call.weights.block_size
    if call.weights.k == blocks * block_size and blocks % mesh.size == 0:
        # Rows of codes and of scales go together, block by block. Where the mesh may
        # cut through blocks, the partitioner would split a mesh axis, which JAX
        # cannot read.
        k, coded, scaled = "(s w)", "(s r)", "s"
        sizes = {"w": block_size, "r": operands[1].shape[-2] // max(blocks, 1)}
    else:
        k, coded, scaled, sizes = "k", "r", "s", {}
    left, right = ("n", k) if call.transpose else (k, "n")
    stack = ["l"] if call.stacked else []
    parts = [
        [*batch, *rows, left],
        [*stack, *batch, coded, "n"],
        [*batch, scaled, "n"],
        *([[]] if call.stacked else []),
    ]
    text = ", ".join(" ".join(part) for part in parts)
    return f"{text} -> {' '.join([*batch, *rows, right])}", sizes


_asked = custom_partitioning(run_backend, static_argnums=(0,))
_asked.def_partition(_partition, sharding_rule=_rule)
