"""The kernel for rows that are sorted by expert.

The last axis of the grid runs over *visits*: pairs of a block of rows and an expert
that has rows in it. A block with rows of several experts is visited once for each of
them, and stays in VMEM in between. The stripe of an expert is decoded at the expert's
first visit.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ...spec import ProductSpec
from . import fused
from .tiling import FEW_ROWS, Chip, Tiling, plan

# Bounds of the number of rows of x in a block. If the rows of an expert end inside a
# block, the whole block is multiplied by the next expert too. Smaller blocks waste less
# of this work, and larger blocks are multiplied faster.
FEWEST_ROWS, MOST_ROWS = 128, 512


class Visits(NamedTuple):
    """The properties of each visit that the kernel reads, as arrays int32 `[T]`."""

    block: Array  # the block of rows
    expert: Array
    first: Array  # the rows of the expert are those from `first` to `end`
    end: Array
    is_new: Array  # whether the previous visit was to another block of rows
    decodes: Array  # whether this is the first visit of the expert


@functools.partial(jax.jit, static_argnames=("chip", "interpret"))
def product(
    spec: ProductSpec,
    x: Array,
    codes: Array,
    scales: Array,
    offsets: Array,
    layer: Array | None = None,
    *,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Returns the products of the rows of x `[M, .]` with their experts.

    Codes are uint8 `[E, ., N]`, or `[L, E, ., N]` with a layer, scales float32
    `[E, ., N]`, and offsets int32 `[E + 1]`.
    """
    if layer is None:
        codes, layer = codes[None], jnp.int32(0)
    num_experts, _, cols = scales.shape
    rows = codes.shape[-2] * spec.format.codes_per_byte
    # A block has about as many rows as an average expert.
    num_rows = x.shape[0]
    average = max(num_rows // max(num_experts, 1), 1)
    max_rows = min(max(2 ** (average.bit_length() - 1), FEWEST_ROWS), MOST_ROWS)
    if num_rows <= FEW_ROWS:
        max_rows = num_rows
    tiling = plan(spec, num_rows, cols, x.dtype, chip, max_rows)
    outputs = rows if spec.transpose else cols
    dtype = spec.result_dtype
    if x.size == 0 or num_experts == 0:
        return jnp.zeros((num_rows, outputs), dtype)
    x, scales = fused.pad(tiling, x, scales)
    visits = find_visits(offsets, num_rows, tiling.tile_m)
    if not tiling.keep:
        # The kernel then uses `decodes` only to mix the left operand. There is a single
        # block of rows, which is mixed at the very first visit.
        is_first_expert = jnp.cumsum(visits.decodes) == 1
        visits = visits._replace(decodes=visits.decodes * is_first_expert)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    y = _call(tiling, layer, visits, x, codes, scales, dtype, interpret)
    return y[:, :outputs]


def find_visits(offsets: Array, num_rows: int, size: int) -> Visits:
    """Returns all visits of blocks of `size` rows.

    Blocks in which no expert has rows are visited too, to write zeros. The number of
    visits is static, and is the largest possible. Unused visits do nothing.
    """
    # 1. Count the visits of each expert, and the blocks before and after all rows of
    #    experts. The first visit with an expert has the number 0.
    num_blocks, num_experts = -(-num_rows // size), offsets.shape[0] - 1
    start, end = offsets[:-1], offsets[1:]
    first_block, last_block = start // size, (end - 1) // size
    counts = jnp.where(end > start, last_block - first_block + 1, 0)
    ends = jnp.cumsum(counts)
    total = ends[-1]
    blocks_before = jnp.minimum(offsets[0] // size, num_blocks)
    end_block = jnp.where(total > 0, -(-offsets[-1] // size), 0)
    first_block_after = jnp.maximum(blocks_before, end_block)

    # 2. Find the expert of each visit, and the number of its earlier visits.
    number = jnp.arange(num_blocks + num_experts - 1, dtype=jnp.int32) - blocks_before
    is_active = (number >= 0) & (number < total)
    nearest_active = jnp.clip(number, 0, jnp.maximum(total - 1, 0))
    expert = jnp.searchsorted(ends, nearest_active, side="right")
    expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
    num_earlier = nearest_active - (ends - counts)[expert]

    # 3. Find the block of each visit: with an expert, or before or after all experts.
    block_after = first_block_after + jnp.maximum(number - total, 0)
    block_after = jnp.minimum(block_after, num_blocks - 1)
    block = jnp.where(is_active, first_block[expert] + num_earlier, block_after)
    block = jnp.where(number < 0, number + blocks_before, block)
    is_new = jnp.concatenate([jnp.ones(1, bool), block[1:] != block[:-1]])
    visits = Visits(
        block=block,
        expert=expert,
        first=jnp.where(is_active, start[expert], 0),
        end=jnp.where(is_active, end[expert], 0),
        is_new=is_new,
        decodes=is_active & (num_earlier == 0),
    )
    return Visits(*(array.astype(jnp.int32) for array in visits))


def _call(
    tiling: Tiling,
    layer: Array,
    visits: Visits,
    left: Array,
    codes: Array,
    scales: Array,
    dtype: DTypeLike,
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    tiling = dataclasses.replace(tiling, emulate=interpret is not False)
    is_transposed = tiling.spec.transpose
    out_cols = tiling.rows if is_transposed else tiling.cols

    # Grid indices: stripe j and visit t. The layer and the arrays of the visits are
    # prefetched, and passed to each index map.
    def left_index(j, t, layer, block, *visits):
        return block[t], 0

    def out_index(j, t, layer, block, *visits):
        return block[t], j

    def for_visits(block_spec: pl.BlockSpec) -> pl.BlockSpec:
        # In `fused`, the expert is a grid index. Here, it is read from the visits.
        fused_index = block_spec.index_map
        assert fused_index is not None

        def weight_index(j, t, layer, block, expert, *visits):
            return fused_index(expert[t], j, 0, layer)

        return pl.BlockSpec(block_spec.block_shape, weight_index)

    left_block = pl.BlockSpec((tiling.tile_m, tiling.contracted), left_index)
    weight_blocks = map(for_visits, fused.weight_blocks(tiling))
    return pl.pallas_call(
        functools.partial(_kernel, tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(visits),
            grid=(pl.cdiv(out_cols, tiling.tile), visits.block.shape[0]),
            in_specs=[left_block, *weight_blocks],
            out_specs=pl.BlockSpec((tiling.tile_m, tiling.tile), out_index),
            scratch_shapes=fused.scratch_shapes(tiling, left.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((tiling.m, out_cols), dtype),
        compiler_params=pltpu.CompilerParams(
            # As in `fused`, the order of stripes matters if the left operand is mixed.
            dimension_semantics=(
                "arbitrary" if tiling.mixed else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=tiling.vmem_limit,
        ),
        interpret=interpret,
        name=f"qlora_ragged_{'dx' if is_transposed else 'fwd'}",
    )(layer, *visits, left, codes, scales)


def _kernel(tiling: Tiling, layer: jax.Ref, *refs: jax.Ref) -> None:
    # Runs one visit of a block of rows. Only the index maps read the layer.
    del layer
    num_visits = len(Visits._fields)
    visits = Visits._make(refs[:num_visits])
    left, codes, scales, out, *scratch = refs[num_visits:]
    stripe, t = pl.program_id(0), pl.program_id(1)
    first, end = visits.first[t], visits.end[t]

    @pl.when(visits.is_new[t] == 1)
    def clear_block() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(first < end)
    def multiply_expert() -> None:
        decodes = visits.decodes[t] == 1
        y = fused.multiply_block(tiling, left, codes, scales, scratch, stripe, decodes)
        row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
        row += visits.block[t] * tiling.tile_m
        # The other rows of the block belong to the experts of other visits.
        other_rows = out[...].astype(jnp.float32)
        is_expert_row = (row >= first) & (row < end)
        y = jnp.where(is_expert_row, y.astype(jnp.float32), other_rows)
        out[...] = y.astype(out.dtype)
