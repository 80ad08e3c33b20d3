"""The product in tiles of columns, for CPUs: the decoded weights stay in cache.

Forward tiles run over N, the input gradient's over K: nothing is summed across tiles.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Float, Float32, UInt8, UInt16

from ..._jax.pytree import take_layer
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
from ...quant.schemes import look_up
from ..spec import Operands, ProductSpec
from .grouped import grouped_product
from .reference import Reference, Take, decode, dot

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
    size, tile = _outputs(spec, codes.shape[-1], math.prod(codes.shape[:-2]))
    # XLA multiplies a single row in 16 bits by another routine than two rows, which is
    # several times slower, but not one in float32. The values are those of 16 bits.
    left = x.astype(jnp.float32) if _is_row(x) and x.dtype.itemsize == 2 else x
    result = jnp.dtype(spec.result or x.dtype)

    def multiply(w: Array) -> Array:
        w = w.astype(left.dtype)
        y = dot(left, w, transpose=spec.transpose, precision=spec.precision)
        return y.astype(result)

    in_pairs = _sums_pairs(spec, x)
    if tile == size and in_pairs:
        return _multiply_row(spec, x, codes, scales)
    # Outside a loop, a gather is as fast as selects and compiles faster.
    if tile == size:
        return multiply(decode(spec, codes, scales, x.dtype, look_up=gather_values))

    def of_tile(start: Any, tile: int) -> Array:
        part = _cut_tile(spec, codes, scales, start, tile)
        if in_pairs:
            return _multiply_row(spec, x, *part)
        return multiply(_decode_tile(spec, *part, x.dtype, tile))

    return _in_tiles(x.shape[:-1], result, size, tile, of_tile)


def _outputs(spec: ProductSpec, n: int, matrices: int) -> tuple[int, int]:
    """Returns the number of outputs, and of those in a tile."""
    size, unit, narrowest = n, 1, NARROWEST_COLUMNS
    if spec.transpose:
        size, unit, narrowest = spec.k, spec.block_size, NARROWEST_ROWS
    return size, _tile(size, unit, narrowest, 4 * matrices * spec.k * n)


def _cut_tile(
    spec: ProductSpec, codes: Array, scales: Array, start: Any, tile: int
) -> tuple[Array, Array]:
    """Returns the codes and scales of a tile of outputs."""
    if spec.transpose:
        per_byte = spec.format.codes_per_byte
        part = _cut(codes, start // per_byte, -(-tile // per_byte), -2)
        blocks = -(-tile // spec.block_size)
        return part, _cut(scales, start // spec.block_size, blocks, -2)
    # Rows of the tile's codes are short and far apart in memory: decoding them in
    # place waits for memory at each row, and a copy does not.
    part = lax.optimization_barrier(_cut(codes, start, tile, -1))
    return part, _cut(scales, start, tile, -1)


def _decode_tile(
    spec: ProductSpec, codes: Array, scales: Array, dtype: Any, tile: int
) -> Array:
    if spec.transpose:
        return _decode(spec, codes, scales, dtype, tile)
    if _has_scaled_tables(spec, tile, dtype):
        return _decode_scaled(spec, codes, scales, dtype)
    return _decode(spec, codes, scales, dtype)


def _in_tiles(
    rows: tuple, dtype: Any, size: int, tile: int, of_tile: Callable[[Any, int], Array]
) -> Array:
    """Returns `of_tile(start, tile)` of all tiles of outputs, `[*rows, size]`."""

    def step(i: Array, y: Array) -> Array:
        return lax.dynamic_update_index_in_dim(
            y, of_tile(i * tile, tile), i, y.ndim - 2
        )

    # Tiles have a separate axis: where they are columns of a matrix, XLA on CPUs
    # converts the whole result at every step on some versions, in 16-bit dtypes.
    count, rest = divmod(size, tile)
    y = lax.fori_loop(0, count, step, jnp.zeros((*rows, count, tile), dtype))
    y = y.reshape(*rows, count * tile)
    if rest:
        y = jnp.concatenate([y, of_tile(size - rest, rest)], axis=-1)
    return y


class Tiled(Reference):
    """Decodes and multiplies one tile at a time."""

    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.product`."""
        x, codes, scales, layer, _ = operands
        if not _sums_pairs(spec, x):
            return super().product(spec, operands)
        # What decodes the codes depends on x here, and reads them where they are: they
        # would be copied in front of a barrier.
        x, scales = lax.optimization_barrier((x, scales))
        codes = codes if layer is None else take_layer(codes, layer)
        return _product(spec, x, codes, scales)

    def _multiply(
        self, spec: ProductSpec, x: Array, codes: Array, scales: Array
    ) -> Array:
        return _product(spec, x, codes, scales)

    def _ragged(
        self, spec: ProductSpec, x: Array, take: Take, offsets: Array, n: int
    ) -> Array:
        def multiply(rows: Array, w: Array) -> Array:
            w = w.astype(x.dtype)
            return dot(rows, w, transpose=spec.transpose, precision=spec.precision)

        def of_tile(start: Any, tile: int) -> Array:
            def weights(e: Any) -> Array:
                codes, scales = take(e)
                if tile < size:
                    codes, scales = _cut_tile(spec, codes, scales, start, tile)
                return _decode_tile(spec, codes, scales, x.dtype, tile)

            return grouped_product(x, offsets, weights, multiply, tile, dtype)

        dtype = jnp.dtype(spec.result or x.dtype)
        size, tile = _outputs(spec, n, 1)
        if tile == size:
            return of_tile(0, tile)
        return _in_tiles(x.shape[:-1], dtype, size, tile, of_tile)


def _is_row(x: Array) -> bool:
    return not export.is_symbolic_dim(x.shape[-2]) and x.shape[-2] == 1


def _sums_pairs(spec: ProductSpec, x: Array) -> bool:
    """Whether `_multiply_row` computes the product."""
    is_narrow = x.dtype.itemsize <= 4
    return _is_row(x) and spec.format.bits == 4 and not spec.transpose and is_narrow


def _multiply_row(spec: ProductSpec, x: Array, codes: Array, scales: Array) -> Array:
    """Returns the product of one row, without the decoded weights."""
    # XLA sums within its loop over columns only what is written out: the two rows of a
    # byte. That leaves half as many rows, whose sum is a product with ones.
    blocks = split_blocks(codes, scales.shape[-2], spec.packing)
    high, low = _pair_values(blocks, spec.format)
    *batch, num_blocks, block_rows, n = high.shape
    missing = 2 * num_blocks * block_rows - spec.k
    x32 = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    pairs = x32.reshape(*batch, num_blocks, block_rows, 2)
    scale = scales[..., None, :]
    first, second = pairs[..., :1], pairs[..., 1:]
    if spec.dtype == x.dtype == jnp.float32:
        # One product with the scale for two weights. int4's are up to 8 before it, so
        # sums are finite for x below 2e37.
        sums = (high * first + low * second) * scale
    else:  # weights are rounded
        round_ = lambda w: _round_in_float32(w, spec.dtype, x.dtype)
        sums = round_(high * scale) * first + round_(low * scale) * second
    sums = sums.reshape(*batch, num_blocks * block_rows, n)
    ones = jnp.ones((*batch, 1, sums.shape[-2]), jnp.float32)
    y = dot(ones, sums, transpose=False, precision=spec.precision)
    return y.astype(spec.result or x.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _pair_values(
    codes: UInt8[Array, "*blocks rows n"], fmt: Format
) -> tuple[Float32[Array, "*blocks rows n"], Float32[Array, "*blocks rows n"]]:
    """Returns the values of the first and of the second row in each byte."""
    # Jitted for the reason that `gather_values` is.
    if fmt.is_uniform:
        value = lambda code: code.astype(jnp.float32) + fmt.table[0]
        return value(codes >> 4), value(codes & np.uint8(15))
    # The byte is the index as it is: in 32 bits, the look-up takes four times as long
    # on JAX 0.12.
    high, low = np.repeat(fmt.table, 16), np.tile(fmt.table, 16)
    return look_up(high, codes), look_up(low, codes)


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
    if not _is_to_bfloat16(first, then):
        return round_to(w, first, then)
    bits = (_rounded_bits(w) >> np.uint32(16)).astype(jnp.uint16)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def _round_in_float32(w: Array, first: Any, then: Any) -> Float32[Array, "..."]:
    """Equals `round_to`, in float32."""
    if not _is_to_bfloat16(first, then):
        return round_to(w, first, then).astype(jnp.float32)
    bits = _rounded_bits(w) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _is_to_bfloat16(first: Any, then: Any) -> bool:
    return then == jnp.bfloat16 and first in (jnp.float32, jnp.bfloat16)


def _rounded_bits(w: Array) -> Array:
    """Returns bits whose upper half is w in bfloat16, if w is not NaN."""
    # Skips XLA's NaN handling: weights are never NaN.
    bits = lax.bitcast_convert_type(w, jnp.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return bits + np.uint32(0x7FFF) + odd


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
