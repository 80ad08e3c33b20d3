"""Blockwise quantization of `[*batch, K, N]` arrays, in float32, as in bitsandbytes.

A *block* is a run of `block_size` values along K, in one column, with a common scale. A
byte holds one 8-bit code or two 4-bit codes: row 2i in the high nibble and row 2i + 1
in the low nibble. These are the bytes of a bitsandbytes `[N, K]` weight, transposed.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from .formats import Format, Packing
from .schemes import SMALLEST_NORMAL, look_up, quotient, times_reciprocal


def quantize_blocks(
    w: Float[Array, "*batch k n"],
    packing: Packing,
    *largest: Array,
) -> tuple[UInt8[Array, "*batch rows n"], Float32[Array, "*batch blocks n"]]:
    """Returns the codes and the scale of each block. K is a multiple of the block.

    `largest` is the optional second argument of `ScaleScheme.encode`.
    """
    fmt, scheme = packing.format, packing.scheme
    *batch, k, n = w.shape
    # 1. The scale of each block: [*batch, k, n] -> [*batch, blocks, block_size, n].
    blocks = w.reshape(*batch, k // packing.block_size, packing.block_size, n)
    scales = _exact_scales(blocks, fmt)
    blocks = blocks.astype(jnp.float32)
    # 2. Normalize with the exact scales, or with the stored ones if the scheme says so.
    used_scales = scales
    if scheme.uses_stored_scales:
        used_scales = scheme.decode(scheme.encode(scales, *largest))
    if fmt.ties == "even":
        # No weight is larger than 16 times its scale, so `divisor` equals the scale.
        # The maximum hides from XLA that the scale is broadcast: XLA would replace the
        # division by a product with the reciprocal.
        bound = jnp.abs(blocks) * np.float32(2.0**-4)
        divisor = jnp.maximum(bound, jnp.abs(used_scales)[..., None, :])
        normalized = blocks / jnp.maximum(divisor, SMALLEST_NORMAL)
    else:
        normalized = times_reciprocal(blocks, used_scales[..., None, :])
    # 3. Assign the codes, and pack two of 4 bits into a byte.
    codes = assign_codes(normalized, fmt)
    if fmt.bits == 4:
        codes = pack_nibbles(codes)
    return codes.reshape(*batch, k // fmt.codes_per_byte, n), scales


def _exact_scales(
    blocks: Float[Array, "*blocks b n"], fmt: Format
) -> Float32[Array, "*blocks n"]:
    """Returns the scale of each block before it is stored."""
    factor = np.float32(1) / np.float32(fmt.peak)
    if fmt.ties == "upper":
        # Take the weight instead of its magnitude: the scale has the weight's sign.
        first = jnp.argmax(jnp.abs(blocks), axis=-2, keepdims=True)
        largest = jnp.take_along_axis(blocks, first, axis=-2)[..., 0, :]
        return largest.astype(jnp.float32) * factor
    largest = _largest_magnitude(blocks).astype(jnp.float32)
    if fmt.ties == "even":
        return quotient(largest, np.float32(fmt.peak))
    # A scale is not negative, so `abs` changes nothing. Without it, LLVM on CPUs may
    # fuse this product with the subtraction in double quantization, and round once
    # instead of twice.
    return jnp.abs(largest * factor)


def _largest_magnitude(
    blocks: Float[Array, "*blocks b n"],
) -> Float[Array, "*blocks n"]:
    """Returns the largest magnitude of each block, or NaN if the block contains NaN."""
    largest = jnp.max(jnp.abs(blocks), axis=-2, initial=0.0)
    if blocks.dtype != jnp.float32:
        return largest
    # XLA's maximum on CPUs may drop NaN, in float32 only. The sum of squares is NaN
    # exactly if a weight is NaN. Unlike `jnp.isnan(blocks)`, it does not need an array
    # as large as the weights.
    return jnp.where(jnp.isnan(jnp.sum(blocks * blocks, axis=-2)), jnp.nan, largest)


def assign_codes(x: Float32[Array, "..."], fmt: Format) -> UInt8[Array, "..."]:
    """Returns the code of the value nearest to `x`; see `Format` for ties."""
    low, high = fmt.table[0], fmt.table[-1]
    if fmt.is_uniform and fmt.ties == "upper":
        # The clip keeps XLA and LLVM from fusing this sum with the product in `x`.
        shifted = jnp.floor(jnp.clip(x, low, -low) + (np.float32(0.5) - low))
        return jnp.minimum(shifted, high - low).astype(jnp.uint8)
    if fmt.is_uniform and fmt.ties == "even":
        return (jnp.clip(jnp.round(x), low, high) - low).astype(jnp.uint8)
    if fmt.is_uniform:
        # Round half down. `ceil(x - 0.5)` would be wrong just above -0.5, where the
        # difference rounds to -1. The fraction below is exact.
        integer = jnp.trunc(x)
        frac = x - integer
        steps = (frac > 0.5).astype(jnp.float32) - (frac <= -0.5).astype(jnp.float32)
        return (jnp.clip(integer + steps, low, high) - low).astype(jnp.uint8)
    # A binary search: four comparisons find the rank of x among the 16 sorted values.
    # Each comparison gives one bit of the rank, the highest bit first.
    rank_bits: list[Array] = []
    for bit in reversed(range(fmt.bits)):
        half = 1 << bit
        thresholds = list(fmt.thresholds[half - 1 :: 2 * half])
        if rank_bits:
            # As in `select_values`, this zero keeps the thresholds inside loops.
            zero = (rank_bits[0] & np.False_).astype(jnp.float32)
            thresholds = [value - zero for value in thresholds]
        rank_bits.insert(0, x > choose(rank_bits, thresholds))
    if np.array_equal(fmt.order, np.arange(len(fmt.order))):  # the rank is the code
        shifted = (b.astype(jnp.uint8) << np.uint8(i) for i, b in enumerate(rank_bits))
        return functools.reduce(operator.or_, shifted)
    return choose(rank_bits, fmt.order)


def choose(index_bits: Iterable[Array], values: Iterable[Any]) -> Any:
    """Returns `values[i]` with a tree of selects on the bits of i, lowest bit first."""
    level = list(values)
    for bit in index_bits:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [jnp.where(bit, high, low) for low, high in pairs]
    return level[0]


def pack_nibbles(codes: UInt8[Array, "*batch rows n"]) -> UInt8[Array, "*batch half n"]:
    """Packs rows `2i` (high) and `2i + 1` (low) of 4-bit codes into row `i`."""
    *batch, rows, n = codes.shape
    pairs = codes.reshape(*batch, rows // 2, 2, n)
    return (pairs[..., 0, :] << 4) | pairs[..., 1, :]


def unpack_nibbles(
    packed: UInt8[Array, "*b half n"], by_selects: bool = False
) -> UInt8[Array, "*b rows n"]:
    """Inverts `pack_nibbles`: twice as many rows, values below 16.

    Selects are faster than shifts by varying amounts on CPUs, which lack such shifts.
    On TPUs, they take more memory: 2.94 GB instead of 2.59 in a step of an 8B model.
    """
    # Bytes [*batch, half, 1, n] and a flag [1, 2, 1] give pairs [*batch, half, 2, n].
    # Shifts by a constant per row are fused and vectorized; a concatenation is not.
    *batch, half, n = packed.shape
    shape = (1,) * (packed.ndim - 1) + (2, 1)
    is_low = lax.broadcasted_iota(jnp.uint8, shape, packed.ndim - 1)
    packed = packed[..., None, :]
    if by_selects:
        pairs = jnp.where(is_low != 0, packed & np.uint8(15), packed >> 4)
    else:
        pairs = (packed >> (4 - 4 * is_low)) & np.uint8(15)
    return pairs.reshape(*batch, 2 * half, n)


def select_values(
    codes: UInt8[Array, "*batch rows n"],
    fmt: Format,
    by_selects: bool = False,
) -> Float32[Array, "*batch k n"]:
    """Returns `table[code]` for stored codes, by selects on their bits.

    `by_selects` is that of `unpack_nibbles`.
    """
    # Gathers are slow on accelerators; 15 selects vectorize.
    if fmt.bits == 4:
        codes = unpack_nibbles(codes, by_selects)
    if fmt.is_uniform:
        return codes.astype(jnp.float32) + fmt.table[0]
    # This zero depends on the codes, until XLA folds it away. Without it, JAX would
    # compute the broadcast constants outside of a scan, and carry 16 arrays of the
    # kernel's size into the scan. Subtracting it, unlike adding it, keeps -0.0.
    zero = (codes & np.uint8(0)).astype(jnp.float32)
    code_bits = [(codes & np.uint8(1 << bit)) != 0 for bit in range(fmt.bits)]
    return choose(code_bits, [value - zero for value in fmt.table])


@functools.partial(jax.jit, static_argnums=1)
def gather_values(
    codes: UInt8[Array, "*batch rows n"], fmt: Format
) -> Float32[Array, "*batch k n"]:
    """Equals `select_values`, but a gather is a tenth of the operations to compile."""
    # Jitted so that it is traced once for each shape, and so that the table is a
    # constant of this function instead of its caller.
    if fmt.is_uniform:
        return select_values(codes, fmt)
    if fmt.bits == 8:
        return look_up(fmt.table, codes.astype(jnp.int32))
    *batch, rows, n = codes.shape
    # The table [2, 256] maps each byte to the values of its high and its low nibble.
    # With a table [256, 2], products would take up to 1.6 times as long. `jnp.take` has
    # more operations, which cost compile time in every product of an unrolled model.
    table = np.stack([np.repeat(fmt.table, 16), np.tile(fmt.table, 16)])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(codes.ndim - 1,), collapsed_slice_dims=(1,), start_index_map=(1,)
    )
    index = lax.broadcast_in_dim(codes, (*codes.shape, 1), range(codes.ndim))
    values = lax.gather(
        jnp.asarray(table), index, numbers, (2, 1), mode="promise_in_bounds"
    )
    return values.reshape(*batch, 2 * rows, n)  # from [*batch, rows, 2, n]


def dequantize_blocks(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    fmt: Format,
    find_values: Callable[[Array, Format], Array] = select_values,
) -> Float32[Array, "*batch k n"]:
    """Returns `table[code] * scale` in float32, the inverse of `quantize_blocks`."""
    *batch, rows, n = codes.shape
    num_blocks = scales.shape[-2]
    # Add an axis of blocks: [*batch, blocks, rows / blocks, n].
    blocks = codes.reshape(*batch, num_blocks, rows // max(num_blocks, 1), n)
    values = find_values(blocks, fmt)  # [*batch, blocks, block_size, n]
    scale_axes = *range(values.ndim - 2), values.ndim - 1
    w = values * lax.broadcast_in_dim(scales, values.shape, scale_axes)
    return w.reshape(*batch, num_blocks * values.shape[-2], n)
