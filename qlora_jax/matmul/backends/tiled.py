"""The product in tiles of columns, for CPUs: the decoded weights stay in cache.

Forward tiles run over N, the input gradient's over K: nothing is summed across tiles.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Float, Float32, UInt8, UInt16

from ...quant.codes import (
    bits_of,
    choose,
    gather_values,
    join_blocks,
    select_values,
    split_blocks,
)
from ...quant.formats import Format
from ...quant.nibbles import choose_nibbles
from ...quant.qtensor import round_to
from ..spec import ProductSpec
from .reference import Reference, decode, dot

# Bytes of a decoded tile in float32: measured best of 1 to 16 MiB on two cores.
TILE_BYTES = 4 * 2**20
# A product packs its left operand again for every tile, and a row of codes is read in
# as many pieces as there are tiles of columns: narrower tiles are slower.
NARROWEST_COLUMNS, NARROWEST_ROWS = 256, 128
# Tables of scaled values: for smaller blocks their 16 products are no longer few beside
# the block's own, and those of more columns leave the first-level cache.
SMALLEST_SCALED_BLOCK, WIDEST_SCALED = 64, 1024


def _product(
    spec: ProductSpec,
    x: Float[Array, "*batch m contracted"],
    codes: UInt8[Array, "*stack rows n"],
    scales: Float32[Array, "*batch blocks n"],
) -> Float[Array, "*batch m outputs"]:
    k, n = spec.k, codes.shape[-1]
    size, unit, narrowest = n, 1, NARROWEST_COLUMNS
    if spec.transpose:
        size, unit, narrowest = k, spec.block_size, NARROWEST_ROWS
    tile = _tile(size, unit, narrowest, 4 * math.prod(codes.shape[:-2]) * k * n)

    # XLA multiplies a single row in 16 bits by another routine than two rows, which is
    # several times slower, but not one in float32. The values are those of 16 bits.
    is_row = not export.is_symbolic_dim(x.shape[-2]) and x.shape[-2] == 1
    is_row = is_row and x.dtype.itemsize == 2
    left = x.astype(jnp.float32) if is_row else x

    def multiply(w: Array) -> Array:
        w = w.astype(left.dtype)
        y = dot(left, w, transpose=spec.transpose, precision=spec.precision)
        return y.astype(x.dtype)

    # Outside a loop, a gather is as fast as selects and compiles faster.
    if tile == size:
        return multiply(decode(spec, codes, scales, x.dtype, look_up=gather_values))

    def of_tile(start: Any, tile: int) -> Array:
        if spec.transpose:
            per_byte = spec.format.codes_per_byte
            part = _cut(codes, start // per_byte, -(-tile // per_byte), -2)
            blocks = -(-tile // spec.block_size)
            part_scales = _cut(scales, start // spec.block_size, blocks, -2)
            return multiply(_decode(spec, part, part_scales, x.dtype, tile))
        # Rows of the tile's codes are short and far apart in memory: decoding them in
        # place waits for memory at each row, and a copy does not.
        part = lax.optimization_barrier(_cut(codes, start, tile, -1))
        part_scales = _cut(scales, start, tile, -1)
        if _has_scaled_tables(spec, tile, x.dtype):
            return multiply(_decode_scaled(spec, part, part_scales, x.dtype))
        return multiply(_decode(spec, part, part_scales, x.dtype))

    def step(i: Array, y: Array) -> Array:
        return lax.dynamic_update_index_in_dim(
            y, of_tile(i * tile, tile), i, y.ndim - 2
        )

    # Tiles have a separate axis: where they are columns of a matrix, XLA on CPUs
    # converts the whole result at every step on some versions, in 16-bit dtypes.
    rows = x.shape[:-1]
    count, rest = divmod(size, tile)
    y = lax.fori_loop(0, count, step, jnp.zeros((*rows, count, tile), x.dtype))
    y = y.reshape(*rows, count * tile)
    if rest:
        y = jnp.concatenate([y, of_tile(size - rest, rest)], axis=-1)
    return y


class Tiled(Reference):
    """Decodes and multiplies one tile at a time."""

    multiply = staticmethod(_product)  # pyright: ignore[reportAssignmentType]


def _tile(size: int, unit: int, narrowest: int, weight_bytes: int) -> int:
    """Columns (or rows: a multiple of the unit) of a tile; they divide, if some do."""
    count = min(-(-weight_bytes // TILE_BYTES), size // max(narrowest, unit))
    if count <= 1:
        return size
    for fewer in range(count, count // 2, -1):
        if size % (fewer * unit) == 0:
            return size // fewer
    return size // count // unit * unit


def _cut(a: Array, start: Any, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(a, start, size, a.ndim + axis)


def _round_to(w: Array, first: Any, then: Any) -> Array:
    """Equals `round_to`; to bfloat16 in two thirds of XLA's operations on CPUs."""
    # Skips XLA's NaN handling: these values are never NaN.
    if then != jnp.bfloat16 or first not in (jnp.float32, jnp.bfloat16):
        return round_to(w, first, then)
    bits = lax.bitcast_convert_type(w, jnp.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


_decode = functools.partial(
    decode,
    look_up=functools.partial(select_values, unpack=choose_nibbles),
    round_to=_round_to,
)


def _has_scaled_tables(spec: ProductSpec, columns: int, dtype: Any) -> bool:
    # Look-ups of values that are scaled and rounded to 16 bits select twice as many at
    # once. Forward only: a gradient's tiles are as wide as the kernel.
    return (
        dtype.itemsize == 2
        and spec.format.bits == 4
        and not spec.format.is_uniform
        and spec.block_size >= SMALLEST_SCALED_BLOCK
        and columns <= WIDEST_SCALED
    )


def _decode_scaled(spec: ProductSpec, codes: Array, scales: Array, dtype: Any) -> Array:
    """Equals `reference.decode`: what is rounded depends on code and scale alone."""
    fmt = spec.format
    tables = _scaled_tables(scales, fmt, spec.dtype, dtype)
    # Or the products would be computed again for every weight.
    tables = lax.optimization_barrier(tables)
    blocks = split_blocks(codes, scales.shape[-2], spec.packing)
    blocks = choose_nibbles(blocks)
    row = lambda code: jnp.broadcast_to(tables[..., code, None, :], blocks.shape)
    w = choose(bits_of(blocks, fmt), [row(code) for code in range(len(fmt.table))])
    return lax.bitcast_convert_type(join_blocks(w, spec.k), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _scaled_tables(
    scales: Float32[Array, "*batch blocks n"], fmt: Format, logical: Any, dtype: Any
) -> UInt16[Array, "*batch blocks 16 n"]:
    """Returns the bits of all values that each block can take, in each column."""
    # As integers: XLA on CPUs selects among bfloat16 in float32. Jitted for the reason
    # that `gather_values` is.
    table = fmt.table.reshape((1,) * (scales.ndim - 1) + (-1, 1))
    products = scales[..., None, :] * table
    return lax.bitcast_convert_type(_round_to(products, logical, dtype), jnp.uint16)
