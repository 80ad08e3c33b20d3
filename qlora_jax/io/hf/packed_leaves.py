"""Reads packed kernels: float tensors are packed as they are read, 4-bit ones moved."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ...quant.codes import dequantize_blocks, quantize_blocks
from ...quant.formats import Packing
from ...quant.pack import surely_decoded_below
from ...quant.qtensor import QTensor, round_to
from ...quant.schemes import FLOAT32, StoredScales
from ...trees.paths import fused_with
from ..device_shards import (
    Arrays,
    Index,
    cells,
    checked_cells,
    empty,
    on_devices,
    pieces,
    put,
    read,
    sizes_of,
)
from ..files import CheckpointError
from ..named_leaves import NamedLeaf
from ..packed.weight import packing_of


def fill_packed(
    leaf: NamedLeaf, q: QTensor, tensors: Mapping[str, Any], done: Callable
) -> Arrays:
    """Returns the arrays of a QTensor that packs float tensors."""
    packing = q.packing
    per_byte = packing.format.codes_per_byte
    k_size = q.matrix_shape[-2]

    @functools.cache
    def largest(name: str) -> tuple:
        if not packing.scheme.needs_largest:
            return ()
        fused = [tensors[one] for one in fused_with(name) if one in tensors]
        found = (
            read(x, (n, slice(0, x.shape[1])), q.dtype)
            for x in fused
            if packing_of(x) is None
            for n in pieces(slice(0, x.shape[0]), x.shape[1])
        )
        of_parts = (np.abs(x).max(initial=0) for x in found)
        return (np.float32(functools.reduce(np.maximum, of_parts, 0)),)

    problem = (
        f"must be finite, and small enough for {packing.fmt} to decode it in "
        f"{q.dtype_name}. Got NaN, infinity or larger weights."
    )

    def make(device: Any, parts: Sequence[Index]) -> Sequence[Array]:
        *batch, rows, columns = parts[0]
        codes = empty(device, parts[0], jnp.uint8)
        scales = empty(device, parts[1], jnp.float32)
        k = slice(rows.start * per_byte, min(rows.stop * per_byte, k_size))
        for name, place, check in checked_cells(leaf.tensors, tuple(batch), problem):
            for n in pieces(columns, k.stop - k.start):
                x = jax.device_put(read(tensors[name], (n, k), q.dtype), device)
                into = codes, scales, (*place, 0, n.start - columns.start)
                codes, scales, ok = _write_packed(*into, packing, x, *largest(name))
                check(ok)
            done(math.prod(sizes_of((columns, k))))
        return codes, scales

    floats = jax.ShapeDtypeStruct(
        q.scales.shape, jnp.float32, sharding=q.scales.sharding
    )
    codes, scales = on_devices([q.codes, floats], make)
    if packing.scheme is FLOAT32:
        return codes, scales
    return codes, *jax.tree.leaves(_stored(leaf, q, scales, largest))


@functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
def _write_packed(
    codes: Array,
    scales: Array,
    start: tuple,
    packing: Packing,
    x: Array,
    *largest: Array,
):
    new_codes, new_scales = quantize_blocks(x.T, packing, *largest)
    codes, scales = _put(codes, new_codes, start), _put(scales, new_scales, start)

    def decode() -> Array:
        # Quantized scales are those of this piece, not yet those of the kernel.
        stored = packing.scheme.encode(new_scales, *largest)
        decoded = packing.scheme.decode(stored)
        w = dequantize_blocks(new_codes, decoded, packing, x.shape[1])
        is_decoded = jnp.isfinite(round_to(w, x.dtype, x.dtype)).all()
        # Scales that overflow are refused when those of the kernel are stored.
        has_scales = jnp.isfinite(decoded).all()
        return jnp.isfinite(x).all() & (is_decoded | ~has_scales)

    is_small = jnp.max(jnp.abs(x), initial=0) < surely_decoded_below(x.dtype)
    return codes, scales, lax.cond(is_small, lambda: True, decode)


def _put(stack: Array, x: Array, start: tuple) -> Array:
    """Returns a stack with a part of one of its kernels written from `start` on."""
    x = jnp.expand_dims(x, tuple(range(stack.ndim - x.ndim)))
    return lax.dynamic_update_slice(stack, x, start[: stack.ndim])


def _stored(
    leaf: NamedLeaf, q: QTensor, scales: Array, largest: Callable[[str], tuple]
) -> StoredScales:
    """Returns scales in their scheme, which may need the mean over a kernel."""
    sharding = scales.sharding
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        scales = jax.device_put(scales, everywhere).addressable_data(0)
    # Arrays without a sharding are not committed to a device.
    device = None if q.scales.sharding is None else [*scales.devices()][0]
    zeros = lambda x: jnp.zeros(x.shape, x.dtype, device=device)
    found = jax.tree.map(zeros, q.stored_scales)
    # One kernel at a time: a program for all of them takes long to compile.
    for index, name in np.ndenumerate(leaf.tensors):
        found = _store_one(found, scales, index, q.packing, *largest(name))
    if not found.is_finite():
        raise CheckpointError(f"{leaf.path} must be {q.packing.scheme.overflow}")
    if q.scales.sharding is None:
        return found
    return jax.tree.map(lambda x, s: put(np.asarray(x), s), found, q.stored_scales)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _store_one(
    stored: StoredScales,
    scales: Array,
    index: tuple,
    packing: Packing,
    *largest: Array,
) -> StoredScales:
    """Returns `stored` with the scales of one kernel of the stack written."""
    start = (*index, 0, 0)
    sizes = (1,) * len(index) + scales.shape[-2:]
    one = lax.dynamic_slice(scales, start, sizes).reshape(scales.shape[-2:])
    encoded = packing.scheme.encode(one, *largest)
    return jax.tree.map(lambda stack, x: _put(stack, x, start), stored, encoded)


def move_packed(
    leaf: NamedLeaf, q: QTensor, tensors: Mapping[str, Any], done: Callable
) -> Arrays:
    """Returns the arrays of a QTensor with the bytes of bitsandbytes' weights."""

    def make(device: Any, parts: Sequence[Index]) -> Sequence[Array]:
        buffers = [
            empty(device, part, x.dtype)
            for part, x in zip(parts, (q.codes, q.scales), strict=True)
        ]
        for index, place in cells(parts[0][:-2]):
            name = leaf.tensors[index]
            stored = tensors[name].rows()
            for i, part in enumerate(parts):
                rows, columns = part[-2:]
                x = np.asarray(stored[i][columns, rows])
                if x.dtype == np.float32 and not np.isfinite(x).all():
                    raise CheckpointError(f"{name}.absmax must be finite.")
                x = jax.device_put(x, device)
                buffers[i] = _write_bytes(buffers[i], x, (*place, 0, 0))
            jax.block_until_ready(buffers)
            done(math.prod(sizes_of(parts[0][-2:])) * 2)
        return buffers

    moved = on_devices([q.codes, q.scales], make)
    for part in ("scale_scales", "scale_offset"):
        struct = getattr(q, part)
        if struct is None:
            continue
        whole = np.empty(struct.shape, np.float32)
        for index, name in np.ndenumerate(leaf.tensors):
            found = np.asarray(getattr(tensors[name], part))
            whole[index] = found.reshape(whole[index].shape)
            if not np.isfinite(whole[index]).all():
                raise CheckpointError(f"{name}.nested_absmax must be finite.")
        moved = *moved, put(whole, struct)
    return moved


@functools.partial(jax.jit, donate_argnums=0)
def _write_bytes(buffer: Array, x: Array, start: tuple) -> Array:
    return _put(buffer, x.T, start)
