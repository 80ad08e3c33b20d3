"""The settings of TPU chips, and the tile sizes of the kernel for a product.

A *block* is a part of an array that Pallas keeps in VMEM, except in `block_size`, which
is that of quantization. `fused` explains stripes and chunks.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from ....quant.formats import INT8
from ...spec import ProductSpec, Unsupported


class Chip(NamedTuple):
    """The form in which the kernel decodes on a chip, and the memory for its blocks."""

    form: str  # as in `decode`; all forms give the same weights
    vmem_mib: int  # for blocks: 96 of 128 MiB (v5e, v6e), or 48 of 64 MiB


CHIPS = {
    "v5e": Chip("sublane", 96),
    "v5p": Chip("sublane", 48),
    "v6e": Chip("shuffle", 96),
    "7x": Chip("shuffle", 48),
    "any": Chip("select", 48),
}
CHIP_NAMES = {  # by `device_kind`
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "7x",
}

FEW_ROWS = 64  # up to this many rows of x, decoded weights are not kept

# The largest chunk of the contracted axis for few rows of x, in bfloat16; half of it in
# float32. The compiler unrolls the loop over a chunk. With longer chunks, decoding and
# multiplication overlap better, but compilation takes longer.
UNROLLED = {"shuffle": 4096, "sublane": 4096, "select": 512}

# The output columns of a block if x has few rows, best first. Wide blocks have less
# overhead. But nothing is computed while the first block is read, so they are used only
# if there are at least MIN_WIDE_BLOCKS of them.
FEW_ROWS_COLUMNS = (512, 256, 128)
WIDE_COLUMNS, MIN_WIDE_BLOCKS = 1024, 8

# The output columns and rows of a block, best first. With wide blocks, x is read less
# often. The matrix unit multiplies large blocks in fewer instruction bundles.
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
    # In transposed products with a `block_size` of 64, narrower blocks hold the scales
    # of all rows (`all_scales`), and these two only those of their own rows.
    (512, 128),
    (512, 64),
)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static parameters of one call of the kernel."""

    spec: ProductSpec
    form: str  # as in `decode`
    rows: int  # of the weight, K, padded
    cols: int  # of the weight, N, padded
    m: int  # rows of the left operand
    tile_m: int  # rows of the left operand in a block
    tile: int  # columns (transposed: rows) of the weight in a stripe
    chunk: int  # length of the contracted axis that is decoded at a time
    keep: bool  # whether the stripe is kept in scratch memory
    mixed: bool  # whether rows are decoded in the order of `decode.mix`
    all_scales: bool  # whether a block holds the scales of all rows (transposed)
    vmem_limit: int  # of the compiler, in bytes
    emulate: bool = False  # whether to avoid operations that run only on a TPU

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
    spec: ProductSpec,
    m: int,
    cols: int,
    dtype: DTypeLike,
    chip: Chip,
    max_rows: int = 1024,
) -> Tiling:
    """Returns the tiling for `m` rows of x and a weight `[spec.k, cols]`.

    A block has up to `max_rows` rows of x. Raises `Unsupported` if the kernel does not
    support the product.
    """
    # 1. Pad the weight to whole lanes and whole blocks of quantization.
    # 2. Choose how to decode: into scratch memory or not, in which order of rows.
    # 3. Return the best shape of blocks that fits VMEM.
    _check(spec, cols, dtype)
    rows = spec.k
    if spec.transpose:
        cols = _round_up(cols, 128)
    else:
        rows = _round_up(rows, math.lcm(spec.block_size, 128))
    contracted, outputs = (cols, rows) if spec.transpose else (rows, cols)
    keep = m > FEW_ROWS
    mixed = chip.form == "shuffle" and dtype == jnp.bfloat16 and spec.format.bits == 4
    mixed = mixed and not keep and spec.block_size % 64 == 0
    itemsize = jnp.dtype(dtype).itemsize
    vmem = chip.vmem_mib * 2**20  # for blocks; the compiler may take a quarter more
    longest_chunk = 512 if keep else UNROLLED[chip.form] * 2 // itemsize
    if keep:
        block_shapes = BLOCKS
    else:
        has_wide = dtype == jnp.bfloat16 and outputs >= MIN_WIDE_BLOCKS * WIDE_COLUMNS
        wide = (WIDE_COLUMNS,) if has_wide else ()
        block_shapes = [(columns, m) for columns in (*wide, *FEW_ROWS_COLUMNS)]
    for max_tile, max_tile_m in block_shapes:
        tile = _round_up(_balanced_tile(outputs, max_tile), 128)
        max_tile_m = min(max_tile_m, max_rows)
        tile_m = m
        if m > max_tile_m:
            tile_m = _round_up(_balanced_tile(m, max_tile_m), 32 // itemsize)
        tiling = Tiling(
            spec=spec,
            form=chip.form,
            rows=rows,
            cols=cols,
            m=m,
            tile_m=tile_m,
            tile=tile,
            chunk=_round_up(_balanced_tile(contracted, longest_chunk), 128),
            keep=keep,
            mixed=mixed,
            all_scales=spec.transpose and tile % (8 * spec.block_size) != 0,
            vmem_limit=vmem * 5 // 4,
        )
        # The blocks and the product must fit `vmem`. The copies that the compiler
        # spills may also use the quarter that it gets in addition.
        product_bytes = 4 * tile_m * tile  # in float32
        if _block_bytes(tiling, itemsize) + product_bytes > vmem:
            continue
        if vmem_bytes(tiling, itemsize) <= tiling.vmem_limit:
            return tiling
    raise Unsupported(f"VMEM is too small for a contracted axis of {contracted}.")


def _check(spec: ProductSpec, cols: int, dtype: DTypeLike) -> None:
    reason = None
    if dtype not in (jnp.bfloat16, jnp.float32):
        reason = f"x must be bfloat16 or float32. Got {jnp.dtype(dtype).name}."
    elif spec.block_size < 16 * spec.format.bits // 4:
        reason = f"`block_size` must be at least 32 in 8 bits. Got {spec.block_size}."
    elif spec.format.bits == 8 and spec.format.values != INT8.values:
        reason = f"It supports only int8 among 8-bit formats. Got {spec.format.name!r}."
    elif spec.k == 0 or cols == 0:
        reason = "The weight must not be empty."
    if reason is not None:
        raise Unsupported(reason)


def _balanced_tile(size: int, max_tile: int) -> int:
    """Returns a tile size up to `max_tile` that makes all tiles about equal."""
    return -(-size // -(-size // max_tile))


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def vmem_bytes(tiling: Tiling, itemsize: int) -> int:
    """Returns an estimate of the VMEM bytes that the compiler uses for a tiling."""
    # With a kept stripe, a block of the left operand is multiplied as a whole. It is
    # larger than the registers, so it is spilled: one more copy in bfloat16, or four in
    # float32, because a product at full precision is computed from bfloat16 parts.
    # Other spills are less than 512 values for each row of the block (libtpu of JAX
    # 0.12.0.1, for v5e and v6e). With few rows, the compiler uses up to 4 MiB more than
    # estimated, which the quarter that `plan` leaves to it covers.
    spilled = 0
    if tiling.keep:
        copies = 1 if itemsize == 2 else 4
        spilled = tiling.tile_m * itemsize * (copies * tiling.contracted + 2**9)
    return _block_bytes(tiling, itemsize) + spilled


def _block_bytes(tiling: Tiling, itemsize: int) -> int:
    # The pipeline has two buffers for each block. There is only one stripe.
    is_transposed, result_dtype = tiling.spec.transpose, tiling.spec.result_dtype
    left = tiling.tile_m * tiling.contracted * itemsize
    codes = tiling.tile * tiling.contracted // tiling.spec.format.codes_per_byte
    has_all_rows = tiling.all_scales or not is_transposed
    scale_rows = tiling.rows if has_all_rows else tiling.tile
    scale_cols = tiling.cols if is_transposed else tiling.tile
    scales = 4 * max(8, scale_rows // tiling.spec.block_size) * scale_cols
    out = tiling.tile_m * tiling.tile * result_dtype.itemsize
    stripe = tiling.tile * tiling.contracted * itemsize if tiling.keep else 0
    return 2 * (left + codes + scales + out) + stripe
