"""Optimizer moments in 8 bits: blocks of 256 codes that share a float32 scale.

Each array is viewed as a *grid* `[layers, rows, columns]`, and a block is 256 columns
of one row. The columns are the longest axis that is divisible by 256, so that blocks do
not extend over devices that split this axis.

Codes are those of the dynamic data type (Dettmers et al. 2022, 8-bit Optimizers via
Block-wise Quantization, section 1.3). Its encoder and decoder are at the end.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.memory import is_concrete
from .._jax.modes import call_in_auto_mode, explicit_mesh
from .._jax.specs import AnyMesh, fitting_spec, spec_of

BLOCK = 256
# Arrays, or layers of stacks, with fewer values stay in float32.
SMALLEST = 4096
_CODES_PER_WORD = 4


class Blocks(NamedTuple):
    """The codes and scales of an array in 8 bits, or the shapes or specs of the two.

    Codes are uint32 `[layers, rows / 4, columns]`: byte `i`, counted from the lowest,
    is the code of row `4 * row + i`. Scales are float32
    `[layers, 4, rows * columns / 1024]`.
    """

    # A TPU can slice one layer of 32-bit words out of host memory. For an array of
    # bytes, it would copy the whole stack.
    codes: Any
    # `[rows, columns / 256]`, reshaped because TPUs would pad its last axis to 128. Its
    # axis of size 4 does not correspond to the bytes of a word.
    scales: Any


# Small arrays are not quantized: their moments are float32 arrays.
Moment = Blocks | Array


class Grid(NamedTuple):
    """The view of an array: rows are a multiple of 4, and columns a multiple of 256."""

    layers: int
    rows: int
    columns: int
    axis: int | None  # the axis of the array that becomes the columns; None: flattened


def grid_of(shape: tuple[int, ...]) -> Grid | None:
    """Returns the grid of an array, or None if the array stays in float32."""
    start = 1 if len(shape) > 2 else 0
    layers, size = math.prod(shape[:start]), math.prod(shape[start:])
    if size < SMALLEST:
        return None
    for axis in sorted(range(start, len(shape)), key=lambda i: -shape[i]):
        columns = shape[axis]
        if columns % BLOCK == 0 and size // columns % _CODES_PER_WORD == 0:
            return Grid(layers, size // columns, columns, axis)
    columns = BLOCK * -(-size // (_CODES_PER_WORD * BLOCK))
    return Grid(layers, _CODES_PER_WORD, columns, None)


def zero_blocks(like: Array, signed: bool) -> Moment:
    """Returns zero moments for an array, with the sharding of the array."""
    grid = grid_of(like.shape)
    if grid is None:
        return jnp.zeros_like(like, jnp.float32)
    shapes = block_shapes(grid)
    word = dynamic_map(signed).zero * 0x01010101  # each byte is the code of zero
    codes = jnp.full(shapes.codes, np.uint32(word), jnp.uint32)
    scales = jnp.zeros(shapes.scales, jnp.float32)
    sharding = getattr(like, "sharding", None) if is_concrete(like) else None
    if (mesh := explicit_mesh(like)) is not None:
        place, spec = jax.sharding.reshard, spec_of(like)
    elif isinstance(sharding, NamedSharding):
        mesh, place = sharding.mesh, jax.device_put
        spec = (*sharding.spec, *[None] * (like.ndim - len(sharding.spec)))
    else:
        return Blocks(codes, scales)
    specs = _block_specs(mesh, spec, grid)
    return Blocks(
        place(codes, NamedSharding(mesh, specs.codes)),
        place(scales, NamedSharding(mesh, specs.scales)),
    )


def from_blocks(moment: Moment, like: Array, signed: bool) -> Array:
    """Returns a moment in float32, with the shape and sharding of an array."""
    grid = grid_of(like.shape)
    if grid is None:
        assert not isinstance(moment, Blocks)
        return moment

    def decode_blocks(blocks: Blocks) -> Array:
        return _from_grid(_decode_grid(blocks, signed), like.shape, grid)

    def spec(_: AnyMesh) -> PartitionSpec:
        return PartitionSpec(*spec_of(like))

    return call_in_auto_mode(decode_blocks, spec, moment)


def to_blocks(values: Array, signed: bool) -> Moment:
    """Rounds float32 values to 8 bits. A NaN or infinity makes its block NaN."""
    grid = grid_of(values.shape)
    if grid is None:
        return values

    def encode_blocks(values: Array) -> Blocks:
        return _encode_grid(_to_grid(values, grid), signed)

    def specs(mesh: AnyMesh) -> Blocks:
        return _block_specs(mesh, spec_of(values), grid)

    return call_in_auto_mode(encode_blocks, specs, values)


def block_shapes(grid: Grid) -> Blocks:
    """Returns the shapes of codes and scales."""
    layers, rows, columns, _ = grid
    codes_shape = (layers, rows // _CODES_PER_WORD, columns)
    return Blocks(codes_shape, (layers, 4, rows * columns // BLOCK // 4))


def _block_specs(mesh: AnyMesh, spec: tuple, grid: Grid) -> Blocks:
    """Returns the specs of codes and scales for an array that is split by `spec`."""
    start = 1 if len(spec) > 2 else 0
    layers = spec[0] if len(spec) > 2 else None
    row_axes = [i for i in range(start, len(spec)) if i != grid.axis]
    # Other axes are flattened to rows. A part of the first one is then a range of rows.
    rows = spec[row_axes[0]] if row_axes else None
    if grid.axis is None:  # A flattened array has only four rows: split its columns.
        rows, columns = None, rows
    else:
        columns = spec[grid.axis]
    shapes = block_shapes(grid)
    return Blocks(
        fitting_spec(mesh, (layers, rows, columns), shapes.codes),
        fitting_spec(mesh, (layers, None, None), shapes.scales),
    )


def _to_grid(x: Array, grid: Grid) -> Array:
    layers, rows, columns, axis = grid
    if axis is not None:
        return jnp.moveaxis(x, axis, -1).reshape(layers, rows, columns)
    flat = x.reshape(layers, x.size // layers)
    missing = rows * columns - flat.shape[1]
    return jnp.pad(flat, ((0, 0), (0, missing))).reshape(layers, rows, columns)


def _from_grid(x: Array, shape: tuple[int, ...], grid: Grid) -> Array:
    layers, rows, columns, axis = grid
    if axis is not None:
        row_sizes = [size for i, size in enumerate(shape) if i != axis]
        return jnp.moveaxis(x.reshape(*row_sizes, columns), -1, axis)
    flat = x.reshape(layers, rows * columns)
    return flat[:, : math.prod(shape) // layers].reshape(shape)


def _encode_grid(x: Array, signed: bool) -> Blocks:
    layers, rows, columns = x.shape
    x = x.reshape(layers, rows, columns // BLOCK, BLOCK)
    # Read as integers, the bits of magnitudes sort like the magnitudes, and NaN is the
    # largest. A maximum of floats may drop a NaN on CPUs.
    bits = lax.bitcast_convert_type(lax.abs(x), jnp.int32)
    scales = lax.bitcast_convert_type(bits.max(-1), jnp.float32)
    is_usable = jnp.isfinite(scales) & (scales > 0)
    divisor = jnp.where(is_usable, scales, 1.0)[..., None]
    normalized = jnp.where(is_usable[..., None], x / divisor, 0.0)
    if not signed:
        # A quotient may underflow, but a positive second moment must not become zero.
        least = jnp.where(bits > 0, jnp.finfo(jnp.float32).tiny, 0.0)
        normalized = jnp.maximum(normalized, least)
    codes = encode(normalized, signed).reshape(layers, rows, columns)
    # Four rows share a word: the code of row 4 * row + i is byte i.
    words = codes[:, ::_CODES_PER_WORD]
    for i in range(1, _CODES_PER_WORD):
        words = words | (codes[:, i::_CODES_PER_WORD] << (8 * i))
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    return Blocks(words, scales.reshape(layers, 4, -1))


def _decode_grid(blocks: Blocks, signed: bool) -> Array:
    words, scales = blocks
    layers, word_rows, columns = words.shape
    rows = word_rows * _CODES_PER_WORD
    words = words[:, :, None]
    bytes_of_words = [(words >> (8 * i)) & 0xFF for i in range(_CODES_PER_WORD)]
    codes = jnp.concatenate(bytes_of_words, 2)  # [layers, rows / 4, 4, columns]
    values = decode(codes, signed).reshape(layers, rows, columns // BLOCK, BLOCK)
    values = values * scales.reshape(layers, rows, columns // BLOCK, 1)
    return values.reshape(layers, rows, columns)


# In the paper, the number of leading zeros of a code (after its sign bit) is a decimal
# exponent, and the bits after the first 1 are a linear fraction. This gives decades:
# decade `e` is the interval `[0.1, 1] * 10**(e - top)` (`top` is 6, or 7 in the
# unsigned map), and its 2**e values are the centers of 2**e equal parts. The map also
# has the values 0 and 1. The unsigned map has one more bit of fraction. Here, a code is
# a position in the sorted map, and the *index* of a value is its position relative to
# zero, plus 1 in the unsigned map, so that decade `e` begins at index 2**e in both.
# Values are computed from the bits of a code, because a look-up in a table of 256
# values is slow on TPUs.
#
# The value at position j = index - 2**e of a decade is
#   10**(e - top) * (0.1 + 0.9 * (j + 1 / 2) / 2**e) = step * (18 * index + offset).
# The factor in parentheses is a small integer, so that each value is a single product
# of two float32 numbers, which every device rounds in the same way. Devices may round
# a sum of products differently. For the value 1, the factor is 1.
class DynamicMap(NamedTuple):
    """Constants of a map, for nine groups of values: zero, seven decades, and 1."""

    zero: int  # the code of zero
    first: int  # the smallest decade, and the index of zero
    offset: np.ndarray
    step: np.ndarray
    least: np.ndarray  # the smallest magnitude that rounds to a value of the group
    low: np.ndarray  # the lower end of the decade
    parts: np.ndarray  # 1 / the width of the equal parts of the decade
    base: np.ndarray  # the index of the first value of the group


@functools.cache
def dynamic_map(signed: bool) -> DynamicMap:
    """Returns the map of signed or of non-negative values."""
    top, first = (6, 0) if signed else (7, 1)
    decades = range(first, top + 1)
    scale = {e: 10.0 ** (e - top) for e in decades}
    lowest = [scale[e] * (0.1 + 0.45 / 2**e) for e in decades] + [1.0]
    highest = [0.0] + [scale[e] * (1 - 0.45 / 2**e) for e in decades]
    middle = [(a + b) / 2 for a, b in zip(highest, lowest, strict=True)]
    last = 2 ** (top + 1)

    def groups(
        at_zero: float, at_decade: Callable[[int], float], at_unit: float
    ) -> np.ndarray:
        return np.array([at_zero, *map(at_decade, decades), at_unit], np.float32)

    return DynamicMap(
        zero=127 if signed else 0,
        first=first,
        offset=groups(0, lambda e: 9 - 16 * 2**e, 1 - 18 * last),
        step=groups(0, lambda e: scale[e] / (20 * 2**e), 1),
        least=np.array([0, *middle], np.float32),
        low=groups(0, lambda e: 0.1 * scale[e], 0),
        parts=groups(0, lambda e: 2**e / (0.9 * scale[e]), 0),
        base=groups(first, lambda e: 2**e, last),
    )


def decode(codes: Array, signed: bool) -> Array:
    """Returns the float32 values in [-1, 1] of integer codes."""
    table = dynamic_map(signed)
    codes = codes.astype(jnp.int32)
    index = lax.abs(codes - table.zero) + table.first
    group = (32 - lax.clz(index)) - table.first
    numerator = 18.0 * index.astype(jnp.float32) + _pick(group, table.offset)
    value = numerator * _pick(group, table.step)
    return jnp.where(codes < table.zero, -value, value)


def encode(x: Array, signed: bool) -> Array:
    """Returns uint32 codes of the values nearest to finite float32 `x` in [-1, 1]."""
    table = dynamic_map(signed)
    magnitude = lax.abs(x)
    group = jnp.zeros(x.shape, jnp.int32)
    for least in table.least[1:]:
        group += (magnitude >= least).astype(jnp.int32)
    if not signed:  # Adam divides by the root: a positive value must not become zero.
        group = lax.max(group, (x > 0).astype(jnp.int32))
    base = _pick(group, table.base)
    # This is a difference and then a product, which a compiler cannot contract into a
    # single operation that rounds once.
    part = jnp.floor((magnitude - _pick(group, table.low)) * _pick(group, table.parts))
    position = base + jnp.clip(part, 0.0, jnp.maximum(base - 1, 0.0)) - table.first
    if signed:  # The map has the value 1, but not -1.
        position = jnp.where(x < 0, -jnp.minimum(position, 127.0), position)
    return (position + table.zero).astype(jnp.uint32)


def _pick(group: Array, values: np.ndarray) -> Array:
    """Returns `values[group]`, computed by selects."""
    cases = [lax.full_like(group, v, jnp.float32) for v in values]
    return lax.select_n(group, *cases)
