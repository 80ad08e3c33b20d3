"""The product over several devices: which parts each one multiplies.

To the partitioner a kernel is opaque, and a decoded weight is one more array to gather.
So the product is a custom-partitioned call, which decides by where its operands lie:

- weights stay where they are, split over their outputs (column-parallel: nothing is
  moved) or over what is contracted (row-parallel: one all-reduce);
- unless rows of `x` are split over the same mesh axes (FSDP): then each device gathers
  the weights, packed, codes and scales in one all-gather of bytes.

`vmap` has its own rule too: it adds row or batch axes, and never reaches the call.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
from jaxtyping import Array

from . import backends
from .reference import Weights


@dataclass(frozen=True)
class _Call:
    """What is static about a call.

    Attributes:
        weights: The packed weights' facts.
        batch: Number of batch axes.
        rows: Number of row axes of x.
        stacked: Whether codes have an axis of layers in front.
        backend: The back end that was asked for, if any.
        transpose: Whether to multiply by the transposed weights.
        precision: As in `dot_general`.
    """

    weights: Weights
    batch: int
    rows: int
    stacked: bool
    backend: str | None
    transpose: bool
    precision: Any


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
    call = _Call(weights, batch, rows, stacked, backend, transpose, precision)
    return _compiled(call)(x, codes, scales, *([layer] if stacked else []))


@functools.lru_cache(maxsize=None)
def _compiled(call: _Call) -> Any:
    """The call as one function of arrays; cached, so that it is traced once."""

    @custom_vmap
    def run(*arrays):
        return _partitioned(call, *arrays)

    @run.def_vmap
    def _(size, batched, *arrays):
        return _batched(call, size, batched, arrays), True

    return jax.jit(run)


def _batched(call, size, batched, arrays):
    """One more row axis where only x is batched; else one more batch axis."""
    x, codes, scales, *layer = arrays
    layers = {"layer": layer[0]} if layer else {"layer": None}
    settings = {f: getattr(call, f) for f in ("weights", "backend", "transpose")}
    settings["precision"] = call.precision
    if batched == [True, False, False, *[False] * len(layer)]:
        x = jnp.moveaxis(x, 0, call.batch)
        y = partitioned_product(x, codes, scales, **layers, **settings)
        return jnp.moveaxis(y, call.batch, 0)
    if layer and batched[3]:
        # Different layers at once: there is no way but to cut them out.
        take = lambda codes, i: lax.dynamic_index_in_dim(codes, i, keepdims=False)
        codes = jax.vmap(take, (0 if batched[1] else None, 0))(codes, layer[0])
        layers, codes_axis = {"layer": None}, 0
    else:
        codes_axis = 1 if layer else 0
        if batched[1]:
            codes = jnp.moveaxis(codes, 0, codes_axis)
        else:
            codes = _repeat(codes, size, codes_axis)
    x, scales = (
        a if is_batched else _repeat(a, size, 0)
        for a, is_batched in zip((x, scales), (batched[0], batched[2]), strict=True)
    )
    return partitioned_product(x, codes, scales, **layers, **settings)


def _repeat(a, size, axis):
    shape = (*a.shape[:axis], size, *a.shape[axis:])
    return jnp.broadcast_to(jnp.expand_dims(a, axis), shape)


def _local(call, x, codes, scales, *layer):
    """The product on one device."""
    batch = x.shape[: call.batch]
    rows = x.shape[call.batch : -1]
    y = backends.product(
        x.reshape(*batch, math.prod(rows), x.shape[-1]),
        codes,
        scales,
        layer[0] if layer else None,
        call.weights,
        backend=call.backend,
        transpose=call.transpose,
        precision=call.precision,
    )
    return y.reshape(*batch, *rows, y.shape[-1])


_partitioned = custom_partitioning(_local, static_argnums=(0,))


@dataclass(frozen=True)
class _Layout:
    """Mesh axes along each axis of the product, and along what weights are gathered.

    Attributes:
        batch: For each batch axis.
        rows: For each row axis.
        k: Axes that split the weights' rows while multiplying.
        n: Axes that split the weights' columns while multiplying.
        stored_k: Axes that split the codes' rows as they are stored.
        stored_n: Axes that split the codes' columns as they are stored.
    """

    batch: tuple
    rows: tuple
    k: tuple
    n: tuple
    stored_k: tuple
    stored_n: tuple


def _axes(entry: Any) -> tuple:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _without(axes: tuple, used: set) -> tuple:
    """The axes before the first used one: what is left of a split in that order."""
    kept = []
    for axis in axes:
        if axis in used:
            break
        kept.append(axis)
    return tuple(kept)


def _layout(call: _Call, mesh: Any, x: Any, codes: Any, scales: Any) -> _Layout:
    """Decides from where the operands lie."""
    x_spec = [_axes(e) for e in x.sharding.spec]
    codes_spec = [_axes(e) for e in codes.sharding.spec][call.stacked :]
    batch, used = [], set()
    for mine, theirs in zip(
        codes_spec[: call.batch], x_spec[: call.batch], strict=True
    ):
        batch.append(_without(mine or theirs, used))
        used.update(batch[-1])
    stored_k = _without(codes_spec[-2], used)
    stored_n = _without(codes_spec[-1], used | set(stored_k))
    rows, taken = [], set(used)
    for entry in x_spec[call.batch : -1]:
        rows.append(_without(entry, taken))
        taken.update(rows[-1])
    k, n = _without(stored_k, taken), _without(stored_n, taken)
    contracted = n if call.transpose else k
    if not contracted:
        # x may come split along what is contracted: the weights are cut to fit it.
        contracted = _without(x_spec[-1], taken | set(k) | set(n))
        k, n = (k, contracted) if call.transpose else (contracted, n)
    if not _splits_blocks(call, mesh, k, scales.shape[-2]):
        k = ()
    if scales.shape[-1] % _ways(mesh, n):
        n = ()
    return _Layout(tuple(batch), tuple(rows), k, n, stored_k, stored_n)


def _ways(mesh: Any, axes: tuple) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _splits_blocks(call: _Call, mesh: Any, axes: tuple, blocks: int) -> bool:
    """Whether every device gets whole blocks, and as many as the others."""
    whole = call.weights.k == blocks * call.weights.block_size
    return not axes or (whole and blocks % _ways(mesh, axes) == 0)


def _partition(call, mesh, operands, result):
    del result
    x, codes, scales, *layer = operands
    found = _layout(call, mesh, x, codes, scales)
    gather_k = found.stored_k if found.k != found.stored_k else ()
    gather_n = found.stored_n if found.n != found.stored_n else ()
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    entry = lambda axes: axes or None
    batch, rows = map(entry, found.batch), map(entry, found.rows)
    batch, rows = tuple(batch), tuple(rows)
    # An axis along which weights are gathered is stored split and multiplied whole.
    stored_k, stored_n = gather_k or found.k, gather_n or found.n
    scale_k = stored_k if _splits_blocks(call, mesh, stored_k, scales.shape[-2]) else ()
    contracted, outputs = (found.n, found.k) if call.transpose else (found.k, found.n)
    weights = call.weights
    if not gather_k:
        k = weights.k // _ways(mesh, found.k)
    else:
        k = weights.k
    local = _Call(
        Weights(weights.fmt, weights.block_size, k, weights.dtype_name),
        call.batch,
        call.rows,
        call.stacked and not (gather_k or gather_n),
        call.backend,
        call.transpose,
        call.precision,
    )

    def lower(*arrays):
        # It is traced while the program compiles, under whatever mesh is set there; on
        # one device there is none.
        with use_abstract_mesh(AbstractMesh((), ())):
            return on_one(*arrays)

    def on_one(x, codes, scales, *layer):
        if gather_k or gather_n:
            if layer:
                codes = lax.dynamic_index_in_dim(codes, layer[0], keepdims=False)
                layer = ()
            if gather_n:
                codes, scales = _gather_columns(codes, scales, gather_n)
            if gather_k and scale_k:
                codes, scales = _gather_rows(codes, scales, gather_k)
            elif gather_k:
                codes = lax.all_gather(codes, gather_k, axis=codes.ndim - 2, tiled=True)
        y = _local(local, x, codes, scales, *layer)
        return lax.psum(y, contracted) if contracted else y

    stack = (None,) if call.stacked else ()
    arguments = (
        place(*batch, *rows, entry(contracted)),
        place(*stack, *batch, entry(stored_k), entry(stored_n)),
        place(*batch, entry(scale_k), entry(stored_n)),
        *[place() for _ in layer],
    )
    return mesh, lower, place(*batch, *rows, entry(outputs)), arguments


def _bytes_of(scales: Array) -> Array:
    """Float32 `[..., s, n]` as uint8 `[..., 4 s, n]`."""
    *lead, s, n = scales.shape
    parts = lax.bitcast_convert_type(scales, jnp.uint8)
    return jnp.moveaxis(parts, -1, -2).reshape(*lead, 4 * s, n)


def _scales_of(parts: Array) -> Array:
    """The inverse of `_bytes_of`."""
    *lead, s, n = parts.shape
    parts = jnp.moveaxis(parts.reshape(*lead, s // 4, 4, n), -2, -1)
    return lax.bitcast_convert_type(parts, jnp.float32)


def _gather_columns(codes: Array, scales: Array, axes: tuple) -> tuple[Array, Array]:
    """Gathers both along N, in one all-gather of bytes."""
    rows = codes.shape[-2]
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 1, tiled=True)
    return both[..., :rows, :], _scales_of(both[..., rows:, :])


def _gather_rows(codes: Array, scales: Array, axes: tuple) -> tuple[Array, Array]:
    """Gathers both along K, in one all-gather of bytes."""
    *lead, rows, n = codes.shape
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 2)
    whole = lambda a: a.reshape(*lead, -1, n)
    return whole(both[..., :rows, :]), _scales_of(whole(both[..., rows:, :]))


def _rule(call, mesh, operands, results):
    """Names the axes that are alike, for the partitioner's propagation."""
    del mesh, results
    batch = [f"b{i}" for i in range(call.batch)]
    rows = [f"m{i}" for i in range(call.rows)]
    stack = ["l"] if call.stacked else []
    blocks = operands[2].shape[-2]
    sizes = {}
    if call.weights.k == blocks * call.weights.block_size:
        # Rows of codes and of scales go together, block by block.
        k, codes, scales = "(s w)", "(s r)", "s"
        size = call.weights.block_size
        coded = operands[1].shape[-2] // max(blocks, 1)
        sizes = {"w": size, "r": coded}
    else:
        k, codes, scales = "k", "r", "s"
    left, right = ("n", k) if call.transpose else (k, "n")
    parts = [
        [*batch, *rows, left],
        [*stack, *batch, codes, "n"],
        [*batch, scales, "n"],
        *([[]] if call.stacked else []),
    ]
    text = ", ".join(" ".join(p) for p in parts)
    return f"{text} -> {' '.join([*batch, *rows, right])}", sizes


_partitioned.def_partition(_partition, sharding_rule=_rule)
