"""Decodes parts of a stripe of the weight, from the references of a kernel's blocks."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import decode
from .tiling import Tiling

LANES = 512  # columns that are decoded at a time


def decode_stripe(
    plan: Tiling, codes: Any, scales: Any, base: Any, start: Any, size: int, dtype: Any
) -> Array:
    """Returns `size` of a stripe's weights along the contracted axis, from `start` on.

    The block of the references `codes` and `scales` begins at row `base` of the weight.
    """
    # In pieces of a few registers: wider ones run out of them.
    first, rows = (0, plan.tile) if plan.spec.transpose else (start, size)
    left, lanes = (start, size) if plan.spec.transpose else (0, plan.tile)
    fmt = plan.spec.format
    slab = 32 * fmt.codes_per_byte
    pieces = []
    for at in range(0, lanes, LANES):
        width = min(LANES, lanes - at)
        columns = pl.ds(multiple(left + at, 128), width)
        table = decode.table_of(fmt, width, plan.form, dtype)
        parts = []
        for row in range(0, rows, slab):
            own = [
                _scale_row(plan, scales, base + first + row + r, columns)
                for r in range(0, slab, min(slab, plan.spec.block_size))
            ]
            byte = multiple(divide(first + row, fmt.codes_per_byte), 32)
            part = codes[pl.ds(byte, 32), columns]
            how = {"mixed": plan.mixed, "emulate": plan.emulate}
            parts.append(
                decode.decode_slab(part, own, fmt, table, plan.form, dtype, **how)
            )
        pieces.append(jnp.concatenate(parts, axis=0))
    return jnp.concatenate(pieces, axis=1)


def _scale_row(plan: Tiling, scales: Any, row: Any, columns: Any) -> Array:
    """Returns the scales of a row of the weight, `[1, n]`."""
    at = divide(row, plan.spec.block_size)
    if not plan.all_scales:
        return scales[pl.ds(at, 1), columns]
    # No load may start at a traced row and a traced column: take eight rows, aligned,
    # and rotate. Rows past the end are padding: any scale will do.
    count = plan.rows // plan.spec.block_size
    at = jnp.minimum(at, count - 1)
    whole = count // 8 * 8
    eight = jnp.zeros((8, scales[0:1, columns].shape[1]), jnp.float32)
    if count > whole:
        rest = scales[whole:count, columns]
        eight = jnp.concatenate([rest, eight[count - whole :]], axis=0)
    if whole:
        first = pl.multiple_of(jnp.minimum(at & ~7, whole - 8), 8)
        eight = jnp.where(at < whole, scales[pl.ds(first, 8), columns], eight)
    return pltpu.roll(eight, (8 - at) & 7, 0)[:1]


def divide(value: Any, by: int) -> Any:
    """Returns `value // by` for a static or a traced number, not negative."""
    return value // by if isinstance(value, int) else lax.div(value, by)


def multiple(value: Any, of: int) -> Any:
    """Tells the compiler that a traced number is a multiple of `of`."""
    return value if isinstance(value, int) else pl.multiple_of(value, of)
