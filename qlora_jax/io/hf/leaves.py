"""Reads the leaves of a tree: transposed, stacked, sharded and optionally packed."""

# Each function reads a leaf in pieces, and writes each piece to its position in a
# buffer on the device. The buffers are donated, so that no copy of the stack is made.

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from ...quant.codes import dequantize_blocks, quantize_blocks
from ...quant.formats import Packing
from ...quant.pack import surely_decoded_below
from ...quant.qtensor import QTensor, round_to
from ...quant.schemes import FLOAT32, StoredScales
from ...trees.paths import fused_with
from ..device_shards import (
    Arrays,
    Device,
    Index,
    batch_indices,
    checked_tensors,
    new_buffer,
    on_devices,
    pieces,
    put,
    read,
    sizes_of,
)
from ..files import CheckpointError
from ..named_leaves import NamedLeaf
from ..stored_weight import packing_of
from ..tensors import SliceableTensor

TensorsByName = Mapping[str, Any]
# The argument `largest` of `quantize_blocks` and `ScaleScheme.encode`: a tuple of the
# largest weight if the scheme needs it, and otherwise an empty tuple.
Largest = tuple[np.float32, ...]
_Start = tuple[int, ...]  # where a piece begins in a buffer, or a kernel in a stack


class _KernelLayout(NamedTuple):
    """How to turn a piece `[n, k]` of a file into a part of a kernel."""

    shape: tuple[int, ...]  # [*N, *K], which the piece is reshaped to first
    order: tuple[int, ...]  # the transposition from [*N, *K] to the kernel's axes
    cuts: tuple[tuple[int, int | None], ...]  # the slice of each kernel axis to keep


def read_float_leaf(
    leaf: NamedLeaf, struct: jax.ShapeDtypeStruct, tensors: TensorsByName, bar: Any
) -> Array:
    """Returns a leaf as a float array."""
    batch_axes = tuple(leaf.batch_axes)

    def read_part(device: Device, parts: Sequence[Index]) -> Arrays:
        (part,) = parts
        buffer = new_buffer(device, part, struct.dtype)
        batch = tuple(part[axis] for axis in batch_axes)
        index = tuple(i for axis, i in enumerate(part) if axis not in batch_axes)
        for name, local_index, check in checked_tensors(leaf.tensor_names, batch):
            tensor = tensors[name]
            # XLA converts 16-bit floats to float32 faster than NumPy does.
            is_widened = tensor.dtype.itemsize == 2 and struct.dtype == jnp.float32
            dtype = tensor.dtype if is_widened else struct.dtype
            for x, layout, inner_start in _float_pieces(leaf, tensor, index, dtype):
                start = list(inner_start)
                # In ascending order, each insertion lands at its final position.
                for axis, i in sorted(zip(batch_axes, local_index, strict=True)):
                    start.insert(axis, i)
                x = jax.device_put(x, device)
                position = tuple(start), layout, batch_axes
                buffer, is_finite = _write_floats(buffer, x, *position)
                check(is_finite)
            bar.update(math.prod(sizes_of(index)))
        return (buffer,)

    return on_devices([struct], read_part)[0]


def _float_pieces(
    leaf: NamedLeaf, tensor: SliceableTensor, index: Index, dtype: DTypeLike
) -> Iterator[tuple[np.ndarray, _KernelLayout | None, _Start]]:
    """Yields pieces of one tensor as stored, their layout, and where they start.

    `index` and the starts have an entry for each axis of the leaf except batch axes.
    """
    if leaf.geometry is not None:
        roles = leaf.geometry.kinds.replace("b", "")
        yield from _kernel_pieces(leaf, roles, tensor, index, dtype)
        return
    shape = leaf.shape[len(leaf.batch_axes) :]
    if leaf.is_vector or not shape:
        x = read(tensor, (), dtype).reshape(shape)[index]
        yield x, None, (0,) * len(shape)
        return
    for rows in pieces(index[0], math.prod(sizes_of(index[1:]))):
        start = (rows.start - index[0].start, *(0 for _ in index[1:]))
        yield read(tensor, (rows, *index[1:]), dtype), None, start


def _kernel_pieces(
    leaf: NamedLeaf,
    roles: str,  # of the axes other than batch axes, such as "knn"
    tensor: SliceableTensor,
    index: Index,
    dtype: DTypeLike,
) -> Iterator[tuple[np.ndarray, _KernelLayout, _Start]]:
    """Yields the pieces of a kernel, which is `[N, K]` in the file."""
    sizes = [n for axis, n in enumerate(leaf.shape) if axis not in leaf.batch_axes]
    n_axes = [axis for axis, role in enumerate(roles) if role == "n"]
    k_axes = [axis for axis, role in enumerate(roles) if role == "k"]
    # N and K may each be several axes, which are flattened in the file. A slice of the
    # first of these axes is a range in the file. The inner ones are read in full, then
    # cut. A kernel without output axes is one row [1, K] in the file.
    n_index = index[n_axes[0]] if n_axes else slice(0, 1)
    k_index = index[k_axes[0]]
    inner_n, inner_k = ([sizes[a] for a in axes[1:]] for axes in (n_axes, k_axes))
    n_stride, k_stride = math.prod(inner_n), math.prod(inner_k)
    columns = slice(k_index.start * k_stride, k_index.stop * k_stride)
    k_shape = [k_index.stop - k_index.start, *inner_k]
    # From [*N, *K] to the axes of the kernel.
    order = tuple((n_axes + k_axes).index(axis) for axis in range(len(roles)))
    first_axes = n_axes[:1] + k_axes[:1]
    ranges = [(i.start, i.stop) for i in index]
    cuts = tuple((0, None) if a in first_axes else x for a, x in enumerate(ranges))
    for n_piece in pieces(n_index, n_stride * math.prod(k_shape)):
        rows = slice(n_piece.start * n_stride, n_piece.stop * n_stride)
        n_shape = [n_piece.stop - n_piece.start, *inner_n] if n_axes else []
        layout = _KernelLayout((*n_shape, *k_shape), order, cuts)
        start = [0] * len(roles)
        if n_axes:
            start[n_axes[0]] = n_piece.start - n_index.start
        yield read(tensor, (rows, columns), dtype), layout, tuple(start)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write_floats(
    buffer: Array,
    x: Array,
    start: _Start,
    layout: _KernelLayout | None,
    batch_axes: tuple[int, ...],
) -> tuple[Array, Bool[Array, ""]]:
    """Writes a piece to a buffer; also returns whether the piece is finite."""
    is_finite = jnp.isfinite(x).all()
    if layout is not None:
        x = x.reshape(layout.shape).transpose(layout.order)
        x = x[tuple(slice(*cut) for cut in layout.cuts)]
    x = jnp.expand_dims(x, batch_axes).astype(buffer.dtype)
    return lax.dynamic_update_slice(buffer, x, start), is_finite


def pack_float_leaf(
    leaf: NamedLeaf, q: QTensor, tensors: TensorsByName, bar: Any
) -> Arrays:
    """Returns the arrays of a QTensor, packed from float tensors."""
    packing = q.packing
    codes_per_byte = packing.format.codes_per_byte
    problem = (
        f"must be finite, and small enough for {packing.fmt} to decode it in "
        f"{q.dtype_name}. Got NaN, infinity or larger weights."
    )

    @functools.cache
    def largest_argument(name: str) -> Largest:
        uses_largest = packing.scheme.uses_largest
        return (_largest_fused(name, tensors, q.dtype),) if uses_largest else ()

    def pack_part(device: Device, parts: Sequence[Index]) -> Arrays:
        codes = new_buffer(device, parts[0], jnp.uint8)
        buffers = codes, new_buffer(device, parts[1], jnp.float32)
        *batch, code_rows, columns = parts[0]
        # A row of 4-bit codes holds two inputs.
        first_input = code_rows.start * codes_per_byte
        inputs = slice(first_input, code_rows.stop * codes_per_byte)
        num_inputs = inputs.stop - inputs.start
        for name, local_index, check in checked_tensors(
            leaf.tensor_names, tuple(batch), problem
        ):
            for outputs in pieces(columns, num_inputs):
                x = read(tensors[name], (outputs, inputs), q.dtype)
                x = jax.device_put(x, device)
                start = (*local_index, 0, outputs.start - columns.start)
                arguments = start, packing, x, *largest_argument(name)
                buffers, is_decodable = _pack_piece(buffers, *arguments)
                check(is_decodable)
            bar.update(math.prod(sizes_of((columns, inputs))))
        return buffers

    # Scales are collected in float32, because some schemes encode all scales of a
    # kernel at once.
    sharding = q.scales.sharding
    float_scales = jax.ShapeDtypeStruct(q.scales.shape, jnp.float32, sharding=sharding)
    structs: list[Any] = [q.codes, float_scales]
    codes, scales = on_devices(structs, pack_part)
    if packing.scheme is FLOAT32:
        return codes, scales
    return codes, *jax.tree.leaves(_store_scales(leaf, q, scales, largest_argument))


def _largest_fused(name: str, tensors: TensorsByName, dtype: np.dtype) -> np.float32:
    """Returns the largest magnitude in a weight and those that servers fuse with it."""
    largest = np.float32(0)
    for x in (tensors[fused] for fused in fused_with(name) if fused in tensors):
        if packing_of(x) is not None:  # the file has its scales already
            continue
        for rows in pieces(slice(0, x.shape[0]), x.shape[1]):
            piece = read(x, (rows, slice(0, x.shape[1])), dtype)
            largest = np.maximum(largest, np.abs(piece).max(initial=0))
    return np.float32(largest)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _pack_piece(
    buffers: Arrays,
    start: _Start,
    packing: Packing,
    x: Array,
    *largest: Array,
) -> tuple[Arrays, Bool[Array, ""]]:
    """Packs a piece `[n, k]`; also returns whether it decodes to finite weights."""
    new_codes, new_scales = quantize_blocks(x.T, packing, *largest)
    codes = _write_matrix(buffers[0], new_codes, start)
    scales = _write_matrix(buffers[1], new_scales, start)

    def is_decodable() -> Array:
        # This encodes the scales of this piece alone. If they overflow, those of the
        # kernel may not: `_store_scales` checks them when it encodes the kernel.
        stored = packing.scheme.encode(new_scales, *largest)
        decoded_scales = packing.scheme.decode(stored)
        w = dequantize_blocks(new_codes, decoded_scales, packing.format)
        is_finite = jnp.isfinite(round_to(w, x.dtype, x.dtype)).all()
        has_finite_scales = jnp.isfinite(decoded_scales).all()
        return jnp.isfinite(x).all() & (is_finite | ~has_finite_scales)

    # Decoding takes time, and small weights always decode to finite ones.
    is_small = jnp.max(jnp.abs(x), initial=0) < surely_decoded_below(x.dtype)
    return (codes, scales), lax.cond(is_small, lambda: True, is_decodable)


def _write_matrix(stack: Array, x: Array, start: _Start) -> Array:
    # `start` ends in a row and a column, but `scale_scales` has only one axis after the
    # batch axes, and `scale_offset` has none.
    x = jnp.expand_dims(x, tuple(range(stack.ndim - x.ndim)))
    return lax.dynamic_update_slice(stack, x, start[: stack.ndim])


def _store_scales(
    leaf: NamedLeaf,
    q: QTensor,
    scales: Array,
    largest_argument: Callable[[str], Largest],
) -> StoredScales:
    """Encodes the float scales of a stack `[*batch, blocks, N]`, kernel by kernel."""
    # 1. Gather the scales on one device: double quantization subtracts their mean, and
    # the last bits of the mean would otherwise depend on the sharding.
    sharding = scales.sharding
    if isinstance(sharding, NamedSharding):
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        scales = jax.device_put(scales, replicated).addressable_data(0)
    # Arrays without a sharding must stay uncommitted, as they are in `q`.
    device = None if q.scales.sharding is None else [*scales.devices()][0]
    stored = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=device), q.stored_scales
    )
    # 2. Encode one kernel at a time. A program for all of them would compile slowly.
    for index, name in np.ndenumerate(leaf.tensor_names):
        largest = largest_argument(name)
        stored = _store_matrix_scales(stored, scales, index, q.packing, *largest)
    if not stored.is_finite():
        raise CheckpointError(f"{leaf.path} must be {q.packing.scheme.overflow}")
    # 3. Split the result over the devices again.
    if q.scales.sharding is None:
        return stored
    return jax.tree.map(
        lambda x, struct: put(np.asarray(x), struct), stored, q.stored_scales
    )


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _store_matrix_scales(
    stored: StoredScales, scales: Array, i: _Start, packing: Packing, *largest: Array
) -> StoredScales:
    start, shape = (*i, 0, 0), scales.shape[-2:]
    matrix = lax.dynamic_slice(scales, start, (1,) * len(i) + shape).reshape(shape)
    encoded = packing.scheme.encode(matrix, *largest)
    return jax.tree.map(lambda x, new: _write_matrix(x, new, start), stored, encoded)


def move_packed_leaf(
    leaf: NamedLeaf, q: QTensor, tensors: TensorsByName, bar: Any
) -> Arrays:
    """Returns the arrays of a QTensor with the same bytes as 4-bit weights in files."""

    def move_part(device: Device, parts: Sequence[Index]) -> Arrays:
        codes = new_buffer(device, parts[0], q.codes.dtype)
        buffers = [codes, new_buffer(device, parts[1], q.scales.dtype)]
        for index, local_index in batch_indices(parts[0][:-2]):
            weight = tensors[leaf.tensor_names[index]]
            for i, stored in enumerate(weight.codes_and_scales()):
                rows, columns = parts[i][-2:]
                x = jax.device_put(np.asarray(stored[columns, rows]), device)
                buffers[i] = _write_transposed(buffers[i], x, (*local_index, 0, 0))
            # Without this, the host copies of several tensors would be alive at once.
            jax.block_until_ready(buffers)
            # A row of codes holds two inputs.
            bar.update(math.prod(sizes_of(parts[0][-2:])) * 2)
        return tuple(buffers)

    structs: list[Any] = [q.codes, q.scales]
    moved = on_devices(structs, move_part)
    # The remaining arrays are small: they are read in full, then split.
    for part in ("scale_scales", "scale_offset"):
        if (struct := getattr(q, part)) is not None:
            stored = [getattr(tensors[name], part) for name in leaf.tensor_names.flat]
            values = np.asarray(stored, np.float32).reshape(struct.shape)
            moved = *moved, put(values, struct)
    return moved


@functools.partial(jax.jit, donate_argnums=0)
def _write_transposed(buffer: Array, x: Array, start: _Start) -> Array:
    return _write_matrix(buffer, x.T, start)
