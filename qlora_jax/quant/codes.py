"""Blockwise quantization of `[*batch, K, N]` arrays, in float32, as in bitsandbytes.

A *block* is `block_size` values along K in one column that share a scale.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Shaped, UInt8

from .formats import Format
from .nibbles import pack_nibbles, unpack_nibbles
from .schemes import FLOAT32, SMALLEST_NORMAL, look_up, quotient, reciprocal
from .settings import Packing


def quantize_blocks(
    w: Float[Array, "*batch k n"], packing: Packing, *largest: Array
) -> tuple[UInt8[Array, "*batch rows n"], Float32[Array, "*batch blocks n"]]:
    """Returns the codes and the scale of each block.

    `largest`, if there is one, is the largest scale of the kernel, for `encode`.
    There are `ceil(K / 2)` rows of 4-bit codes or K of 8-bit ones, and
    `ceil(K / block_size)` rows of scales. An odd K ends with the code of zero.
    """
    k, block_size = w.shape[-2], packing.block_size
    whole = k // block_size * block_size
    if whole == k:
        return _quantize_run(w, packing, block_size, *largest, divide=False)
    tail = w[..., whole:, :]
    if packing.format.bits == 4 and (k - whole) % 2:
        tail = jnp.pad(tail, [(0, 0)] * (w.ndim - 2) + [(0, 1), (0, 0)])
    # bitsandbytes divides in a last, partial block, and multiplies by the reciprocal
    # in whole ones; the two differ in the last bit.
    runs = [_quantize_run(tail, packing, tail.shape[-2], divide=True)]
    if whole:
        run = _quantize_run(w[..., :whole, :], packing, block_size, divide=False)
        runs.insert(0, run)
    codes, scales = zip(*runs, strict=True)
    return jnp.concatenate(codes, axis=-2), jnp.concatenate(scales, axis=-2)


def _quantize_run(
    w: Array, packing: Packing, block_size: int, *largest: Array, divide: bool
) -> tuple[Array, Array]:
    """Quantizes rows that are a multiple of `block_size`."""
    fmt = packing.format
    *batch, k, n = w.shape
    blocks = w.reshape(*batch, -(-k // block_size), block_size, n)
    scales = _exact_scales(blocks, fmt)
    blocks = blocks.astype(jnp.float32)
    scheme, by = packing.scheme, scales
    if scheme.rounds:
        by = scheme.decode(scheme.encode(scales, *largest))
    if fmt.ties == "even" or (divide and fmt.peak == 1 and fmt.scales is FLOAT32):
        # The divisor is the block's scale, written so that XLA does not see a broadcast
        # and turn the division into a product with the reciprocal: no weight is more
        # than 16 times its scale.
        divisor = jnp.maximum(jnp.abs(blocks) * np.float32(2.0**-4), by[..., None, :])
        normalized = blocks / jnp.maximum(divisor, SMALLEST_NORMAL)
    else:
        # Above 2**125 the reciprocal is subnormal and would be flushed to zero.
        down = jnp.where(by > 2.0**125, np.float32(2.0**-4), np.float32(1))
        normalized = (blocks * down[..., None, :]) * reciprocal(by * down)[..., None, :]
    codes = assign_codes(normalized, fmt)
    if fmt.bits == 4:
        codes = pack_nibbles(codes)
    return codes.reshape(*batch, k // fmt.codes_per_byte, n), scales


def _exact_scales(
    blocks: Float[Array, "*blocks b n"], fmt: Format
) -> Float32[Array, "*blocks n"]:
    """Returns the scale of each block before it is stored."""
    if fmt.ties == "upper":
        first = jnp.argmax(jnp.abs(blocks), axis=-2, keepdims=True)
        largest = jnp.take_along_axis(blocks, first, axis=-2)[..., 0, :]
    else:
        largest = _largest(blocks)
    largest = largest.astype(jnp.float32)
    if fmt.ties == "even":
        return quotient(largest, np.float32(fmt.peak))
    if fmt.peak != 1:
        return largest * (np.float32(1) / np.float32(fmt.peak))
    return largest


def _largest(blocks: Float[Array, "*blocks b n"]) -> Float[Array, "*blocks n"]:
    """Returns the largest magnitude of each block; NaN if it has one."""
    largest = jnp.max(jnp.abs(blocks), axis=-2, initial=0.0)
    if blocks.dtype != jnp.float32:
        return largest
    # XLA's maximum on CPUs may drop NaN, in float32 alone. A sum of squares does not,
    # and is NaN for nothing else. `jnp.isnan` takes an array of the weights' size.
    return jnp.where(jnp.isnan(jnp.sum(blocks * blocks, axis=-2)), jnp.nan, largest)


def assign_codes(x: Float32[Array, "..."], fmt: Format) -> UInt8[Array, "..."]:
    """Returns the code of the value nearest to `x`; see `Format` for midpoints."""
    low, high = fmt.table[0], fmt.table[-1]
    if fmt.is_uniform and fmt.ties == "upper":
        # Limits keep XLA and LLVM from fusing the product in `x` and the sum.
        up = jnp.floor(jnp.clip(x, low, -low) + (np.float32(0.5) - low))
        return jnp.minimum(up, high - low).astype(jnp.uint8)
    if fmt.is_uniform and fmt.ties == "even":
        return (jnp.clip(jnp.round(x), low, high) - low).astype(jnp.uint8)
    if fmt.is_uniform:
        # Not ceil(x - 0.5): that difference rounds just above -0.5; this one is exact.
        whole = jnp.trunc(x)
        rest = x - whole
        steps = (rest > 0.5).astype(jnp.float32) - (rest <= -0.5).astype(jnp.float32)
        return (jnp.clip(whole + steps, low, high) - low).astype(jnp.uint8)
    # Binary search: four comparisons find the place among the sorted values.
    is_set: list[Any] = []
    for bit in reversed(range(fmt.bits)):
        half = 1 << bit
        is_set.insert(0, x > choose(is_set, fmt.midpoints[half - 1 :: 2 * half]))
    if np.array_equal(fmt.order, np.arange(len(fmt.order))):
        bits = (b.astype(jnp.uint8) << np.uint8(i) for i, b in enumerate(is_set))
        return functools.reduce(operator.or_, bits)
    return choose(is_set, fmt.order)


def choose(is_set: Iterable, values: Any) -> Any:
    """Returns `values[i]` by a tree of selects on the bits of i, the lowest first."""
    level = list(values)
    for bit in is_set:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [jnp.where(bit, high, low) for low, high in pairs]
    return level[0]


def select_values(
    codes: UInt8[Array, "*batch rows n"],
    fmt: Format,
    unpack: Callable[[Array], Array] = unpack_nibbles,
) -> Float32[Array, "*batch k n"]:
    """Returns `table[code]` for stored codes, by selects on their bits."""
    # Gathers are slow on accelerators; 15 selects vectorize.
    if fmt.bits == 4:
        codes = unpack(codes)
    if fmt.is_uniform:
        return codes.astype(jnp.float32) + fmt.table[0]
    # A zero that depends on the codes: JAX would compute broadcast constants outside a
    # scan and carry 16 arrays of the kernel's size into it. XLA folds it away. Taken
    # off, and not added, it keeps the sign of -0.0.
    zero = (codes & np.uint8(0)).astype(jnp.float32)
    return choose(bits_of(codes, fmt), [value - zero for value in fmt.table])


def bits_of(codes: UInt8[Array, "..."], fmt: Format) -> list[Bool[Array, "..."]]:
    """Returns which bits of the codes are set, the lowest first."""
    return [(codes & np.uint8(1 << bit)) != 0 for bit in range(fmt.bits)]


@functools.partial(jax.jit, static_argnums=1)
def gather_values(
    codes: UInt8[Array, "*batch rows n"], fmt: Format
) -> Float32[Array, "*batch k n"]:
    """Equals `select_values`, by a gather: a tenth of the operations to compile."""
    # Jitted to be traced once for each shape, and so that the table is a constant of
    # this function, not of its caller.
    if fmt.is_uniform:
        return select_values(codes, fmt)
    if fmt.bits == 8:
        return look_up(fmt.table, codes.astype(jnp.int32))
    *batch, rows, n = codes.shape
    # As few operations as possible: each costs compile time in every product of an
    # unrolled model. Were the two values of a byte a row of the table, products would
    # take up to 1.6 times as long.
    table = np.stack([np.repeat(fmt.table, 16), np.tile(fmt.table, 16)])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(codes.ndim - 1,), collapsed_slice_dims=(1,), start_index_map=(1,)
    )
    index = lax.broadcast_in_dim(codes, (*codes.shape, 1), range(codes.ndim))
    values = lax.gather(
        jnp.asarray(table), index, numbers, (2, 1), mode="promise_in_bounds"
    )
    return values.reshape(*batch, 2 * rows, n)


def dequantize_blocks(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    packing: Packing,
    k: int,
    find_values: Callable[[Array, Format], Array] = select_values,
) -> Float32[Array, "*batch k n"]:
    """Returns `table[code] * scale` in float32, the inverse of `quantize_blocks`."""
    blocks = split_blocks(codes, scales.shape[-2], packing)
    values = find_values(blocks, packing.format)
    kept = *range(values.ndim - 2), values.ndim - 1
    w = values * lax.broadcast_in_dim(scales, values.shape, kept)
    return join_blocks(w, k)


def split_blocks(
    codes: UInt8[Array, "*batch rows n"], num_blocks: int, packing: Packing
) -> UInt8[Array, "*batch blocks block_rows n"]:
    """Adds an axis of blocks to stored codes; pads the last block with zeros."""
    *batch, rows, n = codes.shape
    block_rows = packing.block_size // packing.format.codes_per_byte
    if missing := num_blocks * block_rows - rows:
        codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, missing), (0, 0)])
    return codes.reshape(*batch, num_blocks, block_rows, n)


def join_blocks(
    w: Shaped[Array, "*batch blocks block_size n"], k: int
) -> Shaped[Array, "*batch k n"]:
    """Removes the axis of blocks, and the rows beyond K."""
    *batch, num_blocks, block_size, n = w.shape
    w = w.reshape(*batch, num_blocks * block_size, n)
    return w if w.shape[-2] == k else w[..., :k, :]
