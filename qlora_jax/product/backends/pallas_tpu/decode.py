"""Decodes packed codes inside a TPU kernel.

A *slab* holds the weights of one decoding step: 64 rows of a 4-bit weight (32 bytes per
column, or one int32 register of 8 sublanes), or 32 rows of an int8 weight. A *form* is
a way to look up the values of codes:

* ``"shuffle"``: a byte gather along sublanes, on chips that have one (v6e, tpu7x).
* ``"sublane"``: a gather of 8 words along sublanes (v5e and v5p; for float32 also v6e
  and tpu7x).
* ``"select"``: a tree of selects over the four bits of a code, on any chip.

The values of int4 are computed without a look-up, except where shuffles give bfloat16
in fewer operations. Every form gives `dtype(float32(table[code]) * float32(scale))`,
rounded once.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ....quant.codes import choose
from ....quant.formats import INT4, Format
from .tiling import Tiling

PIECE_COLUMNS = 512  # the columns of a weight that are decoded at a time

T = TypeVar("T")


def decode_stripe(
    tiling: Tiling,
    codes: jax.Ref,
    scales: jax.Ref,
    row_offset: Array | int,
    start: Array | int,
    size: int,
    dtype: DTypeLike,
) -> Array:
    """Returns positions `start` to `start + size` of a stripe's contracted axis.

    `scales` begins `row_offset` rows of the weight before `codes`.
    """
    # The stripe is decoded in pieces, because decoding more columns at a time would
    # spill registers. The rows of a piece are decoded one slab at a time.
    if tiling.spec.transpose:
        (first_row, num_rows), (first_col, num_cols) = (0, tiling.tile), (start, size)
    else:
        (first_row, num_rows), (first_col, num_cols) = (start, size), (0, tiling.tile)
    fmt, block_size = tiling.spec.format, tiling.spec.block_size
    slab_rows = 32 * fmt.codes_per_byte
    pieces = []
    for piece_start in range(0, num_cols, PIECE_COLUMNS):
        width = min(PIECE_COLUMNS, num_cols - piece_start)
        columns = pl.ds(assume_multiple(first_col + piece_start, 128), width)
        table = table_of(fmt, width, tiling.form, dtype)
        slabs = []
        for row in range(0, num_rows, slab_rows):
            slab_scales = [
                _scale_row(tiling, scales, row_offset + first_row + row + i, columns)
                for i in range(0, slab_rows, min(slab_rows, block_size))
            ]
            byte = assume_multiple(divide(first_row + row, fmt.codes_per_byte), 32)
            slab_codes = codes[pl.ds(byte, 32), columns]
            slabs.append(decode_slab(tiling, slab_codes, slab_scales, table, dtype))
        pieces.append(jnp.concatenate(slabs, axis=0))
    return jnp.concatenate(pieces, axis=1)


def _scale_row(
    tiling: Tiling, scales: jax.Ref, row: Array | int, columns: slice | pl.Slice
) -> Array:
    """Returns the scales of a row of the weight, `[1, n]`."""
    block = divide(row, tiling.spec.block_size)
    if not tiling.all_scales:
        return scales[pl.ds(block, 1), columns]
    # A load cannot start at both a traced row and a traced column. Instead, this loads
    # eight aligned rows and rotates the requested one to the front. Rows past the end
    # are padding whose results are cut off, so that any scale will do.
    num_blocks = tiling.rows // tiling.spec.block_size
    block = jnp.minimum(block, num_blocks - 1)
    num_aligned = num_blocks // 8 * 8
    eight_rows = jnp.zeros((8, scales[0:1, columns].shape[1]), jnp.float32)
    if num_blocks > num_aligned:
        last_rows = scales[num_aligned:num_blocks, columns]
        eight_rows = jnp.concatenate(
            [last_rows, eight_rows[num_blocks - num_aligned :]], axis=0
        )
    if num_aligned:
        first = pl.multiple_of(jnp.minimum(block & ~7, num_aligned - 8), 8)
        aligned_rows = scales[pl.ds(first, 8), columns]
        eight_rows = jnp.where(block < num_aligned, aligned_rows, eight_rows)
    return pltpu.roll(eight_rows, (8 - block) & 7, 0)[:1]


def divide(value: Array | int, divisor: int) -> Array | int:
    """Returns `value // divisor` for a static or a traced number of 0 or more."""
    return value // divisor if isinstance(value, int) else lax.div(value, divisor)


def assume_multiple(value: Array | int, divisor: int) -> Array | int:
    """Tells the compiler that a traced number is a multiple of `divisor`."""
    return value if isinstance(value, int) else pl.multiple_of(value, divisor)


def decode_slab(
    tiling: Tiling,
    codes: Array,
    scales: list[Array],
    table: Array | None,
    dtype: DTypeLike,
) -> Array:
    """Returns the weights of a slab, `[64, n]`, or `[32, n]` for int8.

    The codes are uint8 `[32, n]`. The scales are one, two or four float32 rows
    `[1, n]`, each for an equal part of the slab.
    """
    if table is None and tiling.spec.format.bits == 8:
        values = codes.astype(jnp.int32).astype(jnp.float32) - 128.0
        return (values * scales[0]).astype(dtype)
    if table is None:
        return _integers(codes, scales, dtype, tiling.emulate)
    if tiling.form == "select":
        return _select(codes, scales, table, dtype)
    if dtype == jnp.float32:
        return _sublane_f32(codes, scales, table)
    if tiling.form == "sublane":
        return _sublane(codes, scales, table, tiling.emulate)
    return (_shuffle_mixed if tiling.mixed else _shuffle)(codes, scales, table)


def mix(values: Array, *, undo: bool = False) -> Array:
    """Puts columns of `[m, 128 i]` in the row order of `_shuffle_mixed`, or back."""
    lane = lax.broadcasted_iota(jnp.int32, (values.shape[0], 128), 1)
    # The six bits of an index, beginning with the highest, are r r r c o h in natural
    # order and h o r r r c in mixed order: r is the word, c the half of the word, o the
    # byte of the half, and h the nibble of the byte.
    inner = lane & 63
    if undo:
        r, c, o, h = inner >> 3, (inner >> 2) & 1, (inner >> 1) & 1, inner & 1
        source = 32 * h + 16 * o + 2 * r + c
    else:
        h, o, r, c = inner >> 5, (inner >> 4) & 1, (inner >> 1) & 7, inner & 1
        source = 8 * r + 4 * c + 2 * o + h
    source = source + (lane & 64)
    parts = [
        _gather(values[:, start : start + 128].astype(jnp.float32), source, axis=1)
        for start in range(0, values.shape[1], 128)
    ]
    return jnp.concatenate(parts, axis=1).astype(values.dtype)


def table_of(fmt: Format, n: int, form: str, dtype: DTypeLike) -> Array | None:
    """Returns the format's table, float32 `[16, n]`, or None if it is not needed."""
    is_shuffled = form == "shuffle" and dtype == jnp.bfloat16
    if fmt.bits == 8 or (fmt.values == INT4.values and not is_shuffled):
        return None
    # Built from literals, because a kernel cannot capture an array.
    values = fmt.values
    row = lax.broadcasted_iota(jnp.int32, (16, 128), 0)
    table = jnp.full((16, 128), values[0], jnp.float32)
    for code in range(1, 16):
        table = jnp.where(row == code, values[code], table)
    return jnp.concatenate([table] * (n // 128), axis=1)


def _shuffle(codes: Array, scales: list[Array], table: Array) -> Array:
    """Returns bfloat16 weights by byte gathers, in 5 operations for 16 rows."""
    n = codes.shape[1]
    position = lax.broadcasted_iota(jnp.int32, (32, n), 0)
    sublane = lax.broadcasted_iota(jnp.int32, (8, n), 0)
    # The low bytes of the 16 scaled entries go to rows 0-15, the high bytes to 16-31.
    low_then_high = jnp.where(position < 16, 2 * position, 2 * position - 31)
    low_then_high = low_then_high.astype(jnp.int8)
    tables = [
        _gather(
            pltpu.bitcast((table * scale).astype(jnp.bfloat16), jnp.int8), low_then_high
        )
        for scale in scales
    ]
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    rotated = pltpu.roll(words, 4, 0)
    weights = []
    for half in range(2):  # 16 bytes, 32 weights
        # Sublanes 0-3 get the high nibbles of the 16 bytes, and 4-7 the low nibbles.
        first, second = (words, rotated) if half == 0 else (rotated, words)
        nibbles = _shift(jnp.where(sublane < 4, first, second), 4 * (sublane < 4))
        nibbles = pltpu.bitcast(nibbles & 0x0F0F0F0F, jnp.int8)
        for part in range(2):
            # Each byte of codes gives four index bytes: high, high, low, low nibble.
            source = 16 * ((position >> 1) & 1) + 8 * part + (position >> 2)
            index = _gather(nibbles, source.astype(jnp.int8))
            # They alternately look up the low and the high byte of a bfloat16.
            index = pltpu.bitcast(
                pltpu.bitcast(index, jnp.int32) | 0x10001000, jnp.int8
            )
            part_table = tables[(2 * half + part) * len(tables) // 4]
            values = _gather(part_table, index)
            weights.append(pltpu.bitcast(values, jnp.bfloat16))  # [16, n]
    return jnp.concatenate(weights, axis=0)


def _shuffle_mixed(codes: Array, scales: list[Array], table: Array) -> Array:
    """Like `_shuffle`, but with 22 instead of 27 operations and rows in mixed order."""
    # Row 8 r + 4 c + 2 o + h of 64 goes to row 32 h + 16 o + 2 r + c; see `mix`.
    (scale,) = scales
    scaled_table = pltpu.bitcast((table * scale).astype(jnp.bfloat16), jnp.int8)
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    is_odd = (lax.broadcasted_iota(jnp.int32, codes.shape, 0) & 1) == 1
    weights = []
    for nibble in (_shift(words, 3), words << 1):
        # Each byte is 2 * code: the row of the entry's low byte in the table. The next
        # row has its high byte.
        index = nibble & 0x1E1E1E1E
        low = _gather(scaled_table, pltpu.bitcast(index, jnp.int8))
        high = _gather(scaled_table, pltpu.bitcast(index | 0x01010101, jnp.int8))
        # Each byte of codes gives a bfloat16 of two bytes: first the even bytes of each
        # word, then the odd ones.
        high_raised = pltpu.bitcast(pltpu.bitcast(high, jnp.int32) << 8, jnp.int8)
        low_lowered = pltpu.bitcast(_shift(pltpu.bitcast(low, jnp.int32), 8), jnp.int8)
        from_even_bytes = jnp.where(is_odd, high_raised, low)
        from_odd_bytes = jnp.where(is_odd, high, low_lowered)
        weights.append(pltpu.bitcast(from_even_bytes, jnp.bfloat16))
        weights.append(pltpu.bitcast(from_odd_bytes, jnp.bfloat16))
    return jnp.concatenate(weights, axis=0)


def _sublane(codes: Array, scales: list[Array], table: Array, emulate: bool) -> Array:
    """Returns bfloat16 weights: gathers pairs of entries, and shifts to pick one."""
    # Word i of a table holds the entries i and i + 8. The low three bits of a code
    # select the word, and the highest bit selects the entry.
    pack = pack_emulated if emulate else _pack
    tables = [pack(table[:8] * scale, table[8:] * scale) for scale in scales]

    def pick(nibbles: Array, pairs: Array) -> Array:
        return _shift(_gather(pairs, nibbles & 7), (nibbles & 8) << 1)

    words = _by_rows(codes, tables, pick).astype(jnp.int16)
    return pltpu.bitcast(words, jnp.bfloat16)


def _pack(low: Array, high: Array) -> Array:
    """Rounds two float32 arrays to bfloat16, and packs them into int32 words."""
    words = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    return lax.bitcast_convert_type(words, jnp.int32)


def pack_emulated(low: Array, high: Array) -> Array:
    """Does the same as `_pack`, whose `pltpu.pack_elementwise` runs only on TPUs."""

    def to_bits(values: Array) -> Array:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)

    words = to_bits(low).astype(jnp.uint32) | to_bits(high).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(words, jnp.int32)


def _sublane_f32(codes: Array, scales: list[Array], table: Array) -> Array:
    """Returns float32 weights from two tables of eight entries."""
    tables = [(table[:8] * scale, table[8:] * scale) for scale in scales]

    def pick(nibbles: Array, halves: tuple[Array, Array]) -> Array:
        low, high = halves
        index = nibbles & 7
        is_high = (nibbles & 8) != 0
        return jnp.where(is_high, _gather(high, index), _gather(low, index))

    return _by_rows(codes, tables, pick)


def _select(codes: Array, scales: list[Array], table: Array, dtype: DTypeLike) -> Array:
    """Returns weights by a tree of 15 selects, one level for each bit of the code."""

    def pick(nibbles: Array, scale: Array) -> Array:
        is_set = ((nibbles & (1 << bit)) != 0 for bit in range(4))
        return choose(is_set, [table[c : c + 1] for c in range(16)]) * scale

    return _by_rows(codes, scales, pick).astype(dtype)


def _integers(
    codes: Array, scales: list[Array], dtype: DTypeLike, emulate: bool
) -> Array:
    """Returns the weights of int4, whose codes 0 to 15 stand for -8 to 7."""

    def pick(nibbles: Array, scale: Array) -> Array:
        return ((nibbles & 15).astype(jnp.float32) - 8.0) * scale

    if dtype == jnp.float32:
        return _by_rows(codes, scales, pick)
    pack = pack_emulated if emulate else _pack
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    weights = []
    for row in range(0, 8, 2):  # 16 weights: 8 bytes per column, one in each sublane
        first = jnp.broadcast_to(words[row : row + 1, :], words.shape)
        second = jnp.broadcast_to(words[row + 1 : row + 2, :], words.shape)
        # Flipping the highest bit of each nibble subtracts 8: code c becomes c - 8 in
        # two's complement.
        both = jnp.where(sublane < 4, first, second) ^ jnp.int32(-0x77777778)
        # Each sublane moves its own byte to the top. The nibble of the even row is then
        # in the highest four bits, and that of the odd row in the next four. Arithmetic
        # shifts to the right extend their signs.
        even = lax.shift_left(both, 24 - 8 * (sublane & 3))
        values = ((x >> 28).astype(jnp.float32) for x in (even, even << 4))
        scale = scales[row * len(scales) // 8]
        weights.append(pack(*(value * scale for value in values)))
    return pltpu.bitcast(jnp.concatenate(weights, axis=0), jnp.bfloat16)


def _by_rows(
    codes: Array, tables: Sequence[T], pick: Callable[[Array, T], Array]
) -> Array:
    """Returns `pick(nibbles, table)` of all rows. Up to four tables share 64 rows."""
    parts = [
        pick(nibbles, tables[i * len(tables) // 8])
        for i, nibbles in enumerate(_rows_of_nibbles(codes))
    ]
    return jnp.concatenate(parts, axis=0)


def _rows_of_nibbles(codes: Array) -> list[Array]:
    """Returns arrays int32 `[8, n]` of codes. Bits above the lowest 4 are arbitrary."""
    # A word has the nibbles of eight rows of a column. It is broadcast along the
    # sublanes, and each sublane shifts it by a different amount, so that the nibbles
    # are in the order of the rows.
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    amount = 8 * (sublane >> 1) + 4 * (1 - (sublane & 1))
    return [
        _shift(jnp.broadcast_to(words[row : row + 1, :], words.shape), amount)
        for row in range(8)
    ]


def _shift(words: Array, amount: Array | int) -> Array:
    return lax.shift_right_logical(words, jnp.broadcast_to(amount, words.shape))


def _gather(table: Array, index: Array, axis: int = 0) -> Array:
    # `jnp.take_along_axis` would add operations that handle indices out of bounds.
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[..., None], numbers, (1, 1), mode=mode)
