"""The product in tiles of columns, for CPUs: decoded weights stay in cache.

A tile is a range of outputs: of columns of the weights in the forward pass, and of rows
in the gradient of the input. So nothing is summed across tiles.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Float32, UInt8, UInt16

from ..._jax.pytree import take_layer
from ...quant.codes import choose, gather_values, select_values, unpack_nibbles
from ...quant.formats import Format
from ...quant.qtensor import round_to
from ...quant.schemes import look_up
from ..spec import Operands, ProductSpec
from .grouped import grouped_product
from .reference import Reference, TakeExpert, decode, dot

# The size of a decoded tile in float32: the fastest of 1 to 16 MiB on two cores.
TILE_BYTES = 4 * 2**20
# Narrower tiles are slower: a product packs its left operand again for every tile, and
# a row of codes is read in as many pieces as there are tiles of columns.
NARROWEST_COLUMNS, NARROWEST_ROWS = 256, 128
# Limits for `_decode_scaled`, which computes a table of 16 scaled values per block and
# column. For smaller blocks, computing the tables is too slow compared with scaling the
# weights themselves. Tables for more columns do not fit the first-level cache.
SMALLEST_SCALED_BLOCK, WIDEST_SCALED = 64, 1024


class Tiled(Reference):
    """Decodes and multiplies one tile at a time."""

    def product(self, spec: ProductSpec, operands: Operands) -> Array:  # noqa: D102
        x, codes, scales, layer, _ = operands
        if layer is not None:
            codes = take_layer(codes, layer)
        is_row = not export.is_symbolic_dim(x.shape[-2]) and x.shape[-2] == 1
        is_4_bit_row = is_row and spec.format.bits == 4
        uses_row_product = is_4_bit_row and not spec.transpose and x.dtype.itemsize <= 4
        # Without the barrier, XLA decodes every layer of a Python loop before the first
        # product. `_multiply_row` decodes and multiplies together, so the codes then
        # need no barrier, which would copy them.
        if uses_row_product:
            x, scales = lax.optimization_barrier((x, scales))
        else:
            x, codes, scales = lax.optimization_barrier((x, codes, scales))
        num_matrices = math.prod(codes.shape[:-2])
        outputs, tile = _tile_outputs(spec, codes.shape[-1], num_matrices)
        # XLA's routine for a single 16-bit row is several times slower than the one for
        # two rows. Its routine for a float32 row is fast, and the cast is exact.
        is_16_bit_row = is_row and x.dtype.itemsize == 2
        left = x.astype(jnp.float32) if is_16_bit_row else x

        def multiply(w: Array) -> Array:
            w = w.astype(left.dtype)
            y = dot(left, w, transpose=spec.transpose, precision=spec.precision)
            return y.astype(spec.result_dtype)

        if tile == outputs and uses_row_product:
            return _multiply_row(spec, x, codes, scales)
        if tile == outputs:
            # Outside a loop, a gather is as fast as selects and compiles faster.
            w = decode(spec, codes, scales, x.dtype, find_values=gather_values)
            return multiply(w)

        def compute_tile(start: Array | int, length: int) -> Array:
            part = _cut_tile(spec, codes, scales, start, length)
            if uses_row_product:
                return _multiply_row(spec, x, *part)
            return multiply(_decode_tile(spec, *part, x.dtype, length))

        return _join_tiles(x.shape[:-1], spec.result_dtype, outputs, tile, compute_tile)

    def _multiply_experts(
        self,
        spec: ProductSpec,
        x: Array,
        take_expert: TakeExpert,
        offsets: Array,
        n: int,
    ) -> Array:
        dtype = spec.result_dtype
        outputs, tile = _tile_outputs(spec, n, 1)

        def multiply(rows: Array, w: Array) -> Array:
            w = w.astype(x.dtype)
            return dot(rows, w, transpose=spec.transpose, precision=spec.precision)

        def compute_tile(start: Array | int, length: int) -> Array:
            def decode_expert(expert: Array) -> Array:
                codes, scales = take_expert(expert)
                if length < outputs:
                    codes, scales = _cut_tile(spec, codes, scales, start, length)
                return _decode_tile(spec, codes, scales, x.dtype, length)

            return grouped_product(x, offsets, decode_expert, multiply, length, dtype)

        if tile == outputs:
            return compute_tile(0, outputs)
        return _join_tiles(x.shape[:-1], dtype, outputs, tile, compute_tile)


def _tile_outputs(spec: ProductSpec, n: int, num_matrices: int) -> tuple[int, int]:
    """Returns the number of outputs, and the number of outputs in a tile."""
    outputs, unit, narrowest = n, 1, NARROWEST_COLUMNS
    if spec.transpose:
        # Tiles of rows consist of whole blocks.
        outputs, unit, narrowest = spec.k, spec.block_size, NARROWEST_ROWS
    weight_bytes = 4 * num_matrices * spec.k * n
    num_tiles = min(-(-weight_bytes // TILE_BYTES), outputs // max(narrowest, unit))
    if num_tiles <= 1:
        return outputs, outputs
    # Prefers tiles of equal size, because a smaller last tile is compiled separately.
    for count in range(num_tiles, num_tiles // 2, -1):
        if outputs % (count * unit) == 0:
            return outputs, outputs // count
    return outputs, outputs // num_tiles // unit * unit


def _cut_tile(
    spec: ProductSpec, codes: Array, scales: Array, start: Array | int, tile: int
) -> tuple[Array, Array]:
    """Returns the codes and scales of `tile` outputs, beginning at output `start`."""
    cut = lax.dynamic_slice_in_dim
    if spec.transpose:
        per_byte = spec.format.codes_per_byte
        part = cut(codes, start // per_byte, tile // per_byte, -2)
        block_size = spec.block_size
        return part, cut(scales, start // block_size, tile // block_size, -2)
    # The rows of a tile's codes are short and far apart in memory. Decoding them in
    # place would wait for memory at each row; the barrier makes XLA copy them first.
    part = lax.optimization_barrier(cut(codes, start, tile, -1))
    return part, cut(scales, start, tile, -1)


def _join_tiles(
    rows: tuple[int, ...],
    dtype: np.dtype,
    outputs: int,
    tile: int,
    compute_tile: Callable[[Array | int, int], Array],
) -> Array:
    """Returns `compute_tile(start, length)` of all tiles, `[*rows, outputs]`."""

    def compute_and_store(i: Array, y: Array) -> Array:
        return lax.dynamic_update_index_in_dim(
            y, compute_tile(i * tile, tile), i, y.ndim - 2
        )

    # The array has a separate axis of tiles. If tiles were columns of a matrix, some
    # versions of XLA on CPUs would convert the entire 16-bit result at every step.
    num_tiles, num_left = divmod(outputs, tile)
    y = jnp.zeros((*rows, num_tiles, tile), dtype)
    y = lax.fori_loop(0, num_tiles, compute_and_store, y)
    y = y.reshape(*rows, num_tiles * tile)
    if num_left:
        y = jnp.concatenate([y, compute_tile(outputs - num_left, num_left)], axis=-1)
    return y


def _multiply_row(spec: ProductSpec, x: Array, codes: Array, scales: Array) -> Array:
    """Returns the product of a single row, without storing decoded weights."""
    # XLA does not fuse decoding into a dot. A single loop therefore decodes weights,
    # multiplies them by x, and adds the two rows of each byte. A dot with ones then
    # adds up these sums, of which there are half as many as weights.
    *batch, num_blocks, n = scales.shape
    block_rows = spec.block_size // 2
    blocks = codes.reshape(*batch, num_blocks, block_rows, n)
    high, low = _pair_values(blocks, spec.format)
    pairs = x.astype(jnp.float32).reshape(*batch, num_blocks, block_rows, 2)
    scale = scales[..., None, :]  # [*batch, blocks, 1, n]
    first, second = pairs[..., :1], pairs[..., 1:]  # [*batch, blocks, block_rows, 1]
    if spec.dtype == x.dtype == jnp.float32:
        # Two weights share one multiplication by the scale. Unscaled int4 values have
        # magnitudes of up to 8, so the sums are finite for x below 2e37.
        sums = (high * first + low * second) * scale
    else:
        # Weights are rounded after scaling, so each has to be scaled first.
        products = _round_in_float32(high * scale, spec.dtype, x.dtype) * first
        sums = products + _round_in_float32(low * scale, spec.dtype, x.dtype) * second
    sums = sums.reshape(*batch, num_blocks * block_rows, n)
    ones = jnp.ones((*batch, 1, sums.shape[-2]), jnp.float32)
    y = dot(ones, sums, transpose=False, precision=spec.precision)
    return y.astype(spec.result_dtype)


# Jitted for the same reason as `gather_values` in quant/codes.py.
@functools.partial(jax.jit, static_argnums=1)
def _pair_values(
    codes: UInt8[Array, "*blocks rows n"], fmt: Format
) -> tuple[Float32[Array, "*blocks rows n"], Float32[Array, "*blocks rows n"]]:
    """Returns the values of the first and of the second row in each byte."""
    if fmt.is_uniform:
        high, low = codes >> 4, codes & np.uint8(15)
        lowest = fmt.table[0]
        return high.astype(jnp.float32) + lowest, low.astype(jnp.float32) + lowest
    # The byte itself is the index into tables of 256 values. With 32-bit indices, the
    # look-up takes four times as long on JAX 0.12.
    high, low = np.repeat(fmt.table, 16), np.tile(fmt.table, 16)
    return look_up(high, codes), look_up(low, codes)


def _decode_tile(
    spec: ProductSpec, codes: Array, scales: Array, dtype: np.dtype, tile: int
) -> Array:
    # Selecting among values that are already scaled and rounded to 16 bits handles
    # twice as many weights at once. This is not used for gradients, whose tiles are as
    # wide as the kernel.
    if (
        not spec.transpose
        and dtype.itemsize == 2
        and spec.format.bits == 4
        and not spec.format.is_uniform
        and spec.block_size >= SMALLEST_SCALED_BLOCK
        and tile <= WIDEST_SCALED
    ):
        return _decode_scaled(spec, codes, scales, dtype)
    find_values = functools.partial(select_values, by_selects=True)
    return decode(spec, codes, scales, dtype, find_values, _round_to)


def _decode_scaled(
    spec: ProductSpec, codes: Array, scales: Array, dtype: np.dtype
) -> Array:
    # Equals `reference.decode`, because a weight depends only on its code and scale.
    fmt = spec.format
    tables = _scaled_tables(scales, fmt, spec.dtype, dtype)  # [*batch, blocks, 16, n]
    # Without the barrier, XLA would compute the tables again for every weight.
    tables = lax.optimization_barrier(tables)
    *batch, num_blocks, n = scales.shape
    blocks = codes.reshape(*batch, num_blocks, spec.block_size // 2, n)
    blocks = unpack_nibbles(blocks, by_selects=True)
    entries = [
        jnp.broadcast_to(tables[..., code, None, :], blocks.shape)
        for code in range(len(fmt.table))
    ]
    code_bits = [(blocks & np.uint8(1 << bit)) != 0 for bit in range(4)]
    w = choose(code_bits, entries).reshape(*batch, num_blocks * spec.block_size, n)
    return lax.bitcast_convert_type(w, dtype)


# Jitted for the same reason as `gather_values` in quant/codes.py.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _scaled_tables(
    scales: Float32[Array, "*batch blocks n"],
    fmt: Format,
    logical_dtype: np.dtype,
    dtype: np.dtype,
) -> UInt16[Array, "*batch blocks 16 n"]:
    """Returns the bits of the 16 possible weights of each block and column."""
    # Returns bits, because XLA on CPUs would convert bfloat16 to float32 to select it.
    table = fmt.table.reshape((1,) * (scales.ndim - 1) + (-1, 1))
    products = scales[..., None, :] * table
    return lax.bitcast_convert_type(
        _round_to(products, logical_dtype, dtype), jnp.uint16
    )


def _round_to(w: Array, dtype: np.dtype, result_dtype: np.dtype) -> Array:
    """Like `round_to`, but takes two thirds of the operations for bfloat16 on CPUs."""
    if not _rounds_to_bfloat16(dtype, result_dtype):
        return round_to(w, dtype, result_dtype)
    bits = (_rounded_bits(w) >> np.uint32(16)).astype(jnp.uint16)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def _round_in_float32(
    w: Array, dtype: np.dtype, result_dtype: np.dtype
) -> Float32[Array, "..."]:
    """Like `round_to`, but returns the rounded values in float32."""
    if not _rounds_to_bfloat16(dtype, result_dtype):
        return round_to(w, dtype, result_dtype).astype(jnp.float32)
    bits = _rounded_bits(w) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _rounds_to_bfloat16(dtype: np.dtype, result_dtype: np.dtype) -> bool:
    return result_dtype == jnp.bfloat16 and dtype in (jnp.float32, jnp.bfloat16)


def _rounded_bits(w: Array) -> Array:
    # The upper half of the result is w in bfloat16, rounded to nearest even. This omits
    # XLA's handling of NaN, because weights are never NaN.
    bits = lax.bitcast_convert_type(w, jnp.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return bits + np.uint32(0x7FFF) + odd
