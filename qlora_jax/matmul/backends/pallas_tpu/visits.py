"""The kernel for rows that are sorted by expert.

The grid's last axis goes over *visits*: pairs of a block of rows and an expert that has
rows in it. A block of several experts is visited by each, and stays in VMEM meanwhile.
An expert's stripe is decoded at its first visit.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...spec import ProductSpec
from . import grid
from .chips import Chip
from .fused import pad
from .tiling import FEW_ROWS, Tiling, plan

# Rows of x in a block. A block in which an expert's rows end is multiplied by the next
# one too: smaller blocks waste less, and larger ones are multiplied faster.
FEWEST_ROWS, MOST_ROWS = 128, 512


class Visits(NamedTuple):
    """What each visit is of, as the kernel reads it; int32 `[T]` each."""

    block: Array  # of rows
    expert: Array
    first: Array  # the expert's rows, from `first` to `end`
    end: Array
    is_new: Array  # whether the block of rows is another than the last
    decodes: Array  # whether it is the expert's first visit


def plan_for(
    spec: ProductSpec, rows: int, experts: int, cols: int, dtype: Any, chip: Chip
) -> Tiling | str:
    """Returns the plan for `rows` rows of x and so many experts, or why not."""
    wanted = max(rows // max(experts, 1), 1)
    most = min(max(1 << (wanted.bit_length() - 1), FEWEST_ROWS), MOST_ROWS)
    return plan(spec, rows, cols, dtype, chip, most if rows > FEW_ROWS else rows)


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
    interpret: Any = False,
) -> Array:
    """Returns the products of the rows of x `[M, .]` with their experts.

    Codes are uint8 `[E, ., N]`, or `[L, E, ., N]` with a layer, scales float32
    `[E, ., N]`, and offsets int32 `[E + 1]`.
    """
    if layer is None:
        codes, layer = codes[None], jnp.int32(0)
    experts, _, cols = scales.shape
    rows = codes.shape[-2] * spec.format.codes_per_byte
    found = plan_for(spec, x.shape[0], experts, cols, x.dtype, chip)
    assert isinstance(found, Tiling), found
    outputs = rows if spec.transpose else cols
    dtype = jnp.dtype(spec.result or x.dtype)
    if x.size == 0 or experts == 0:
        return jnp.zeros((x.shape[0], outputs), dtype)
    x, scales = pad(found, x, scales)
    visits = visit(offsets, x.shape[0], found.tile_m)
    if not found.keep:  # the left operand is mixed at the first visit, not each
        first = jnp.cumsum(visits.decodes) == 1
        visits = visits._replace(decodes=visits.decodes * first)
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    return _call(found, layer, visits, x, codes, scales, dtype, interpret)[:, :outputs]


def visit(offsets: Array, rows: int, size: int) -> Visits:
    """Returns all visits of blocks of `size` rows.

    Blocks in which no expert has rows are visited too, for zeros. There are as many
    visits as there may be: those that are left over do nothing.
    """
    blocks, experts = -(-rows // size), offsets.shape[0] - 1
    start, end = offsets[:-1], offsets[1:]
    at, last = start // size, (end - 1) // size
    counts = jnp.where(end > start, last - at + 1, 0)
    ends = jnp.cumsum(counts)
    total = ends[-1]
    before = jnp.minimum(offsets[0] // size, blocks)
    after = jnp.maximum(before, jnp.where(total > 0, -(-offsets[-1] // size), 0))

    number = jnp.arange(blocks + experts - 1, dtype=jnp.int32) - before
    is_active = (number >= 0) & (number < total)
    active = jnp.clip(number, 0, jnp.maximum(total - 1, 0))
    expert = jnp.searchsorted(ends, active, side="right")
    expert = jnp.minimum(expert, experts - 1).astype(jnp.int32)
    nth = active - (ends - counts)[expert]
    rest = jnp.minimum(after + jnp.maximum(number - total, 0), blocks - 1)
    block = jnp.where(is_active, at[expert] + nth, rest)
    block = jnp.where(number < 0, number + before, block)
    only = lambda a: jnp.where(is_active, a[expert], 0)
    is_new = jnp.concatenate([jnp.ones(1, bool), block[1:] != block[:-1]])
    arrays = block, expert, only(start), only(end), is_new, is_active & (nth == 0)
    return Visits(*(a.astype(jnp.int32) for a in arrays))


def _call(
    plan: Tiling,
    layer: Array,
    visits: Visits,
    left: Array,
    codes: Array,
    scales: Array,
    dtype: Any,
    interpret: Any,
) -> Array:
    plan = dataclasses.replace(plan, emulate=interpret is not False)
    out_cols = plan.rows if plan.spec.transpose else plan.cols
    left_block = pl.BlockSpec(
        (plan.tile_m, plan.contracted), lambda j, t, _, block, *rest: (block[t], 0)
    )
    out_block = pl.BlockSpec(
        (plan.tile_m, plan.tile), lambda j, t, _, block, *rest: (block[t], j)
    )
    # As in `grid`, where the expert is a number of the grid.
    blocks: Any = grid.weight_blocks(plan)
    of_expert = [
        pl.BlockSpec(
            spec.block_shape,
            lambda j, t, layer, block, expert, *rest, at=spec.index_map: at(
                expert[t], j, 0, layer
            ),
        )
        for spec in blocks
    ]
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(visits),
            grid=(pl.cdiv(out_cols, plan.tile), visits.block.shape[0]),
            in_specs=[left_block, *of_expert],
            out_specs=out_block,
            scratch_shapes=grid.scratch(plan, left.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((plan.m, out_cols), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "arbitrary" if plan.mixed else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=plan.vmem_limit,
        ),
        interpret=interpret,
        name=f"qlora_ragged_{'dx' if plan.spec.transpose else 'fwd'}",
    )(layer, *visits, left, codes, scales)


def _kernel(plan: Tiling, layer: Any, *refs: Any) -> None:
    """One visit of a block of rows."""
    del layer  # only the index maps need it
    visits, refs = Visits(*refs[: len(Visits._fields)]), refs[len(Visits._fields) :]
    left, codes, scales, out, *scratch = refs
    stripe, t = pl.program_id(0), pl.program_id(1)
    first, end = visits.first[t], visits.end[t]

    @pl.when(visits.is_new[t] == 1)
    def _() -> None:
        out[...] = jnp.zeros(out.shape, out.dtype)

    @pl.when(first < end)
    def _() -> None:
        decodes = visits.decodes[t] == 1
        y = grid.block(plan, left, codes, scales, scratch, stripe, decodes)
        row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
        row += visits.block[t] * plan.tile_m
        kept = out[...].astype(jnp.float32)
        is_own = (row >= first) & (row < end)
        out[...] = jnp.where(is_own, y.astype(jnp.float32), kept).astype(out.dtype)
