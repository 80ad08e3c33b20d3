"""Tile sizes from shapes, and what the kernel cannot serve."""

from typing import Any

import jax.numpy as jnp

from qlora_jax.matmul.pallas_tpu import decode
from qlora_jax.matmul.pallas_tpu.kernel import Plan

FEW_ROWS = 64  # up to this many rows of x, decoded chunks are not kept

# Output columns and rows of a block, best first: wide blocks read x less often, and
# the matrix unit takes large ones at fewer bundles a product.
BLOCKS = (
    (1024, 1024),
    (512, 1024),
    (1024, 512),
    (512, 512),
    (512, 256),
    (256, 512),
    (256, 256),
    (256, 128),
    (128, 256),
    (128, 128),
    (128, 64),
)


def refusal(
    rows: int, cols: int, dtype: Any, fmt: str, block_size: int, form: str
) -> str | None:
    """Says why a weight `[rows, cols]` cannot be served, or None when it can."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32. Got {jnp.dtype(dtype).name}."
    if fmt != "int8" and fmt not in decode.TABLES:
        return f"`fmt` must be one of {(*decode.TABLES, 'int8')}. Got {fmt!r}."
    if form not in decode.FORMS:
        return f"`decode` must be one of {decode.FORMS}. Got {form!r}."
    if block_size != 32 and block_size % 64:
        return f"`block_size` must be 32 or a multiple of 64. Got {block_size}."
    if rows % block_size:
        return (
            f"`block_size` must divide the rows of the weight. Got {block_size=} and "
            f"{rows} rows."
        )
    if rows == 0 or cols == 0:
        return "The weight must not be empty."
    return None


def choose(
    m: int,
    rows: int,
    cols: int,
    dtype: Any,
    *,
    fmt: str,
    block_size: int,
    transpose: bool,
    form: str,
    vmem: int,
) -> Plan | None:
    """Returns the first plan that fits VMEM, best first; None when none does."""
    contracted, outputs = (cols, rows) if transpose else (rows, cols)
    keep = m > FEW_ROWS
    mixed = form == "shuffle" and dtype == jnp.bfloat16 and fmt != "int8"
    mixed = mixed and not keep and block_size % 64 == 0
    itemsize = jnp.dtype(dtype).itemsize
    for most, most_m in BLOCKS if keep else ((512, m), (256, m), (128, m)):
        tile = _even(outputs, most, 128)
        plan = Plan(
            fmt=fmt,
            block_size=block_size,
            transpose=transpose,
            form=form,
            rows=rows,
            cols=cols,
            m=m,
            tile_m=_even(m, most_m, 32 // itemsize) if m > most_m else m,
            tile=tile,
            chunk=min(512 if keep else 4096, contracted),
            keep=keep,
            mixed=mixed,
            all_scales=transpose and tile % (8 * block_size) != 0,
            vmem_limit=vmem * 5 // 4,
        )
        if vmem_bytes(plan, itemsize) <= vmem:
            return plan
    return None


def _even(size: int, most: int, unit: int) -> int:
    """Returns a tile of at most `most`, so that the tiles of `size` are alike."""
    tile = -(-size // -(-size // most))
    return -(-tile // unit) * unit


def vmem_bytes(plan: Plan, itemsize: int) -> int:
    """An estimate of the VMEM that a plan needs: blocks twice, scratch once."""
    left = plan.tile_m * plan.contracted * itemsize
    codes = plan.tile * plan.contracted // plan.codes_a_byte
    scale_rows = plan.rows if plan.all_scales or not plan.transpose else plan.tile
    scale_cols = plan.cols if plan.transpose else plan.tile
    scales = 4 * max(8, scale_rows // plan.block_size) * scale_cols
    out = plan.tile_m * plan.tile * itemsize
    stripe = plan.tile * plan.contracted * itemsize if plan.keep else 0
    return 2 * (left + codes + scales + out) + stripe + 4 * plan.tile_m * plan.tile
