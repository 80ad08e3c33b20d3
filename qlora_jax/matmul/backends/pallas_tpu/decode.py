"""Packed codes to weights inside a TPU kernel.

A *slab* is the weights of one decoding step: 64 rows of a 4-bit weight (32 bytes a
column, so one int32 register of 8 sublanes), or 32 rows of an int8 weight. A *form* is
a way to look the table up:

* ``"shuffle"``: a byte gather along sublanes, on chips that have one (v6e, tpu7x).
* ``"sublane"``: a gather of 8 words along sublanes (v4, v5e, v5p; float32 anywhere).
* ``"select"``: a tree of selects over the four code bits, on any chip.

Integers of 4 bits are computed, but where shuffles give bfloat16, which takes fewer
operations. Every form gives `dtype(float32(table[code]) * float32(scale))`, rounded
once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from ....quant.codes import choose
from ....quant.formats import INT4, Format


def decode_slab(
    codes: Array,
    scales: list[Array],
    fmt: Format,
    table: Array | None,
    form: str,
    dtype: Any,
    *,
    mixed: bool = False,
    emulate: bool = False,
) -> Array:
    """Returns the weights of one slab, `[64, n]`, or `[32, n]` for int8.

    Codes are uint8 `[32, n]`, scales one, two or four float32 rows `[1, n]`, each for a
    part of the slab. Rows are in the order of `mix` if `mixed` (shuffle, bfloat16).
    """
    if table is None and fmt.bits == 8:
        values = codes.astype(jnp.int32).astype(jnp.float32) - 128.0
        return (values * scales[0]).astype(dtype)
    if table is None:
        return _integers(codes, scales, dtype, emulate)
    if form == "select":
        return _select(codes, scales, table, dtype)
    if dtype == jnp.float32:
        return _sublane_f32(codes, scales, table)
    if form == "sublane":
        return _sublane(codes, scales, table, emulate)
    return (_shuffle_mixed if mixed else _shuffle)(codes, scales, table)


def mix(values: Array, *, undo: bool = False) -> Array:
    """Reorders columns of `[m, 128 i]` as `_shuffle_mixed` does rows, or back."""
    lane = lax.broadcasted_iota(jnp.int32, (values.shape[0], 128), 1)
    inner = lane & 63  # natural: r r r c o h; mixed: h o r r r c
    if undo:
        r, c, o, h = inner >> 3, (inner >> 2) & 1, (inner >> 1) & 1, inner & 1
        source = 32 * h + 16 * o + 2 * r + c
    else:
        h, o, r, c = inner >> 5, (inner >> 4) & 1, (inner >> 1) & 7, inner & 1
        source = 8 * r + 4 * c + 2 * o + h
    source = source + (lane & 64)
    parts = [
        _gather(values[:, at : at + 128].astype(jnp.float32), source, axis=1)
        for at in range(0, values.shape[1], 128)
    ]
    return jnp.concatenate(parts, axis=1).astype(values.dtype)


def table_of(fmt: Format, n: int, form: str, dtype: Any) -> Array | None:
    """Returns the format's table, float32 `[16, n]`; None where it is not read."""
    # From literals: a kernel may not capture an array.
    is_shuffled = form == "shuffle" and dtype == jnp.bfloat16
    if fmt.bits == 8 or (fmt.values == INT4.values and not is_shuffled):
        return None
    values = fmt.values
    row = lax.broadcasted_iota(jnp.int32, (16, 128), 0)
    table = jnp.full((16, 128), values[0], jnp.float32)
    for c in range(1, 16):
        table = jnp.where(row == c, values[c], table)
    return jnp.concatenate([table] * (n // 128), axis=1)


def _shuffle(codes: Array, scales: list[Array], table: Array) -> Array:
    """bfloat16 weights by byte gathers: 5 operations for 16 rows, and the table's."""
    n = codes.shape[1]
    p = lax.broadcasted_iota(jnp.int32, (32, n), 0)
    sublane = lax.broadcasted_iota(jnp.int32, (8, n), 0)
    # Low bytes of the 16 scaled entries in rows 0-15, high bytes in rows 16-31.
    order = jnp.where(p < 16, 2 * p, 2 * p - 31).astype(jnp.int8)
    tables = [
        _gather(pltpu.bitcast((table * s).astype(jnp.bfloat16), jnp.int8), order)
        for s in scales
    ]
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    turned = pltpu.roll(words, 4, 0)
    out = []
    for half in range(2):  # 16 bytes, 32 weights
        # Sublanes 0-3: high nibbles of the 16 bytes; 4-7: low nibbles of the same.
        first, second = (words, turned) if half == 0 else (turned, words)
        nibbles = _shift(jnp.where(sublane < 4, first, second), 4 * (sublane < 4))
        nibbles = pltpu.bitcast(nibbles & 0x0F0F0F0F, jnp.int8)
        for part in range(2):
            # Four index bytes for a byte of codes: high, high, low, low nibble ...
            source = 16 * ((p >> 1) & 1) + 8 * part + (p >> 2)
            index = _gather(nibbles, source.astype(jnp.int8))
            # ... which look up the low and the high byte of a bfloat16 by turns.
            index = pltpu.bitcast(
                pltpu.bitcast(index, jnp.int32) | 0x10001000, jnp.int8
            )
            own = tables[(2 * half + part) * len(tables) // 4]
            values = _gather(own, index)
            out.append(pltpu.bitcast(values, jnp.bfloat16))  # [16, n]
    return jnp.concatenate(out, axis=0)


def _shuffle_mixed(codes: Array, scales: list[Array], table: Array) -> Array:
    """As `_shuffle` in 4 operations fewer of 26, rows in another order."""
    # Row 8 r + 4 c + 2 o + h of 64 goes to row 32 h + 16 o + 2 r + c; see `mix`.
    (scale,) = scales
    scaled = pltpu.bitcast((table * scale).astype(jnp.bfloat16), jnp.int8)
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]
    odd = (lax.broadcasted_iota(jnp.int32, codes.shape, 0) & 1) == 1
    out = []
    for nibble in (_shift(words, 3), words << 1):
        index = nibble & 0x1E1E1E1E  # bytes 2 * code: row of the entry's low byte
        low = _gather(scaled, pltpu.bitcast(index, jnp.int8))
        high = _gather(scaled, pltpu.bitcast(index | 0x01010101, jnp.int8))
        raised = pltpu.bitcast(pltpu.bitcast(high, jnp.int32) << 8, jnp.int8)
        lowered = pltpu.bitcast(_shift(pltpu.bitcast(low, jnp.int32), 8), jnp.int8)
        out.append(pltpu.bitcast(jnp.where(odd, raised, low), jnp.bfloat16))
        out.append(pltpu.bitcast(jnp.where(odd, high, lowered), jnp.bfloat16))
    return jnp.concatenate(out, axis=0)


def _sublane(codes: Array, scales: list[Array], table: Array, emulate: bool) -> Array:
    """bfloat16 weights: one gather brings entries c and c + 8, a shift picks one."""
    pack = pack_emulated if emulate else _pack
    tables = [pack(table[:8] * s, table[8:] * s) for s in scales]

    def pick(nibbles: Array, pairs: Array) -> Array:
        return _shift(_gather(pairs, nibbles & 7), (nibbles & 8) << 1)

    words = _by_rows(codes, tables, pick).astype(jnp.int16)
    return pltpu.bitcast(words, jnp.bfloat16)


def _pack(low: Array, high: Array) -> Array:
    """Rounds two float32 arrays to bfloat16, in the halves of int32 words."""
    words = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    return lax.bitcast_convert_type(words, jnp.int32)


def pack_emulated(low: Array, high: Array) -> Array:
    """Equals `_pack` on a TPU; `pltpu.pack_elementwise` runs on no other device."""

    def bits(values: Array) -> Array:
        return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)

    words = bits(low).astype(jnp.uint32) | bits(high).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(words, jnp.int32)


def _sublane_f32(codes: Array, scales: list[Array], table: Array) -> Array:
    """float32 weights from two tables of eight entries."""
    tables = [(table[:8] * s, table[8:] * s) for s in scales]

    def pick(nibbles: Array, halves: tuple[Array, Array]) -> Array:
        low, high = halves
        index = nibbles & 7
        upper = (nibbles & 8) != 0
        return jnp.where(upper, _gather(high, index), _gather(low, index))

    return _by_rows(codes, tables, pick)


def _select(codes: Array, scales: list[Array], table: Array, dtype: Any) -> Array:
    """Weights by a tree of 15 selects, bit by bit of the code."""

    def pick(nibbles: Array, scale: Array) -> Array:
        is_set = ((nibbles & (1 << bit)) != 0 for bit in range(4))
        return choose(is_set, [table[c : c + 1] for c in range(16)]) * scale

    return _by_rows(codes, scales, pick).astype(dtype)


def _integers(codes: Array, scales: list[Array], dtype: Any, emulate: bool) -> Array:
    """Weights of codes 0 to 15 for -8 to 7."""
    if dtype == jnp.float32:
        integers = lambda nibbles: (nibbles & 15).astype(jnp.float32) - 8.0
        return _by_rows(codes, scales, lambda nibbles, s: integers(nibbles) * s)
    pack = pack_emulated if emulate else _pack
    words = pltpu.bitcast(codes, jnp.int32)
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    row = lambda r: jnp.broadcast_to(words[r : r + 1, :], words.shape)
    out = []
    for r in range(0, 8, 2):  # 8 bytes of each column, one in a sublane, 16 weights
        both = jnp.where(sublane < 4, row(r), row(r + 1)) ^ jnp.int32(-0x77777778)
        # 8 more or less changed the sign of each nibble: the even row's goes to the
        # highest bits, and the odd row's behind it.
        even = lax.shift_left(both, 24 - 8 * (sublane & 3))
        values = ((x >> 28).astype(jnp.float32) for x in (even, even << 4))
        out.append(pack(*(value * scales[r * len(scales) // 8] for value in values)))
    return pltpu.bitcast(jnp.concatenate(out, axis=0), jnp.bfloat16)


def _by_rows(codes: Array, tables: Sequence, pick: Callable) -> Array:
    """Returns weights by `pick(nibbles, table)`, up to four tables for 64 rows."""
    rows = enumerate(_rows_of_nibbles(codes))
    parts = [pick(nibbles, tables[r * len(tables) // 8]) for r, nibbles in rows]
    return jnp.concatenate(parts, axis=0)


def _rows_of_nibbles(codes: Array) -> list[Array]:
    """Returns int32 `[8, n]`: the codes of eight rows, junk above their four bits."""
    # A word holds a column's nibbles of eight rows: broadcast along sublanes and
    # shifted by another amount in each, it gives them in row order.
    words = pltpu.bitcast(codes, jnp.int32)  # [8, n]; the load broadcasts its rows
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    amount = 8 * (sublane >> 1) + 4 * (1 - (sublane & 1))
    return [
        _shift(jnp.broadcast_to(words[r : r + 1, :], words.shape), amount)
        for r in range(8)
    ]


def _shift(words: Array, amount: Array | int) -> Array:
    return lax.shift_right_logical(words, jnp.broadcast_to(amount, words.shape))


def _gather(table: Array, index: Array, axis: int = 0) -> Array:
    """Gathers along an axis; `jnp.take_along_axis` would add bounds handling."""
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    mode = lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return lax.gather(table, index[..., None], numbers, (1, 1), mode=mode)
