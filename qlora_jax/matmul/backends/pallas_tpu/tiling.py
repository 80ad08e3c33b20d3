"""Tile sizes of a call from its shapes, or why there are none."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ....quant.formats import INT8
from ...spec import ProductSpec
from .chips import Chip

FEW_ROWS = 64  # up to this many rows of x, decoded chunks are not kept

# What the compiler sees at once of the contracted axis, with few rows in bfloat16; half
# of it in float32. The longer, the better it overlaps decoding and multiplying, and the
# longer it takes.
UNROLLED = {"shuffle": 4096, "sublane": 4096, "select": 512}

# Output columns of a block with few rows, best first. Wide blocks carry less overhead,
# but nothing is computed while the first is read: only where that many follow.
FEW = (512, 256, 128)
WIDE, MANY = 1024, 8

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
    # Transposed, these have the scales of their own rows alone (`all_scales`).
    (512, 128),
    (512, 64),
)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static facts of one call of the kernel."""

    spec: ProductSpec
    form: str  # as in `decode`
    rows: int  # of the weight, K, padded
    cols: int  # of the weight, N, padded
    m: int  # rows of the left operand
    tile_m: int  # rows of the left operand in a block
    tile: int  # columns (or, transposed, rows) of the weight in a stripe
    chunk: int  # of the contracted axis in one decoding step
    keep: bool  # whether the stripe is kept in scratch
    mixed: bool  # whether rows are decoded in the order of `decode.mix`
    all_scales: bool  # whether a block holds those of every row (transposed)
    vmem_limit: int  # of the compiler, in bytes
    emulate: bool = False  # whether to do without operations that only a TPU has

    @property
    def contracted(self) -> int:
        """The length of the contracted axis."""
        return self.cols if self.spec.transpose else self.rows

    @property
    def stripe_shape(self) -> tuple[int, int]:
        """The shape of a stripe."""
        if self.spec.transpose:
            return self.tile, self.contracted
        return self.contracted, self.tile


def plan(
    spec: ProductSpec, m: int, cols: int, dtype: Any, chip: Chip, most_rows: int = 1024
) -> Tiling | str:
    """Returns the plan for `m` rows of x and a weight `[spec.k, cols]`, or why not.

    A block has up to `most_rows` rows of x.
    """
    reason = _refusal(spec, cols, dtype)
    if reason is not None:
        return reason
    rows = spec.k
    if spec.transpose:
        cols = _up(cols, 128)
    else:
        rows = _up(rows, math.lcm(spec.block_size, 128))
    contracted, outputs = (cols, rows) if spec.transpose else (rows, cols)
    keep = m > FEW_ROWS
    mixed = chip.form == "shuffle" and dtype == jnp.bfloat16 and spec.format.bits == 4
    mixed = mixed and not keep and spec.block_size % 64 == 0
    itemsize = jnp.dtype(dtype).itemsize
    vmem = chip.vmem_mib * 2**20  # of blocks; what the compiler adds may take a quarter
    is_wide = dtype == jnp.bfloat16 and outputs >= MANY * WIDE
    few = (WIDE, *FEW) if is_wide else FEW
    longest = 512 if keep else UNROLLED[chip.form] * 2 // itemsize
    for most, most_m in BLOCKS if keep else [(most, m) for most in few]:
        tile, most_m = _up(_even(outputs, most), 128), min(most_m, most_rows)
        plan = Tiling(
            spec=spec,
            form=chip.form,
            rows=rows,
            cols=cols,
            m=m,
            tile_m=_up(_even(m, most_m), 32 // itemsize) if m > most_m else m,
            tile=tile,
            chunk=_up(_even(contracted, longest), 128),
            keep=keep,
            mixed=mixed,
            all_scales=spec.transpose and tile % (8 * spec.block_size) != 0,
            vmem_limit=vmem * 5 // 4,
        )
        product = 4 * plan.tile_m * tile  # in float32
        if _block_bytes(plan, itemsize) + product > vmem:
            continue
        if vmem_bytes(plan, itemsize) <= plan.vmem_limit:
            return plan
    return f"A stripe of {contracted} overflows VMEM."


def _refusal(spec: ProductSpec, cols: int, dtype: Any) -> str | None:
    """Says why a product is not supported, or None if it is."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32. Got {jnp.dtype(dtype).name}."
    if spec.block_size < 16 * spec.format.bits // 4:
        return f"`block_size` must be at least 32 in 8 bits. Got {spec.block_size}."
    if spec.k % spec.block_size:
        return (
            "`block_size` must divide the rows of the weight. Got "
            f"block_size={spec.block_size} and {spec.k} rows."
        )
    if spec.format.bits == 8 and spec.format.values != INT8.values:
        return f"It has no table of 256 values. Got {spec.packing.fmt!r}."
    if spec.k == 0 or cols == 0:
        return "The weight must not be empty."
    return None


def _even(size: int, most: int) -> int:
    """Returns a tile of at most `most`, so that the tiles of `size` are alike."""
    return -(-size // -(-size // most))


def _up(size: int, unit: int) -> int:
    """Returns `size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def vmem_bytes(plan: Tiling, itemsize: int) -> int:
    """Returns a bound of the VMEM that the compiler takes for a plan."""
    # A block of the left operand is larger than the registers, so it is spilled where
    # it is multiplied whole: one more copy of it, and in float32, whose product at full
    # precision is of parts in bfloat16, four. Other spills are less than 512 values for
    # each of its rows (libtpu of JAX 0.12.0.1, for v5e and v6e). With few rows the
    # compiler takes up to 4 MiB more than this, of the quarter that `plan` leaves.
    spilled = 0
    if plan.keep:
        copies = 1 if itemsize == 2 else 4
        spilled = plan.tile_m * itemsize * (copies * plan.contracted + 2**9)
    return _block_bytes(plan, itemsize) + spilled


def _block_bytes(plan: Tiling, itemsize: int) -> int:
    """Bytes of blocks, twice each as the pipeline has them, and of scratch."""
    left = plan.tile_m * plan.contracted * itemsize
    codes = plan.tile * plan.contracted // plan.spec.format.codes_per_byte
    scale_rows = plan.rows if plan.all_scales or not plan.spec.transpose else plan.tile
    scale_cols = plan.cols if plan.spec.transpose else plan.tile
    scales = 4 * max(8, scale_rows // plan.spec.block_size) * scale_cols
    result = plan.spec.result
    out_itemsize = itemsize if result is None else jnp.dtype(result).itemsize
    out = plan.tile_m * plan.tile * out_itemsize
    stripe = plan.tile * plan.contracted * itemsize if plan.keep else 0
    return 2 * (left + codes + scales + out) + stripe
