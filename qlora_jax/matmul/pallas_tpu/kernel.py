"""The kernel: decode a tile of the weight in VMEM, multiply, repeat.

The contracted axis is never cut by the grid: a block of the left operand holds all of
it, so that one decoded *stripe* of the weight (a tile of its output axis, the whole
contracted axis) serves every block of rows of the left operand. With few rows there is
one such block, and each decoded chunk goes to the matrix unit at once; with more the
stripe stays in VMEM scratch, decoded when the first block of rows comes by.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlora_jax.matmul.pallas_tpu import decode


LANES = 512  # columns that are decoded at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about one call.

    Attributes:
        fmt: Format of the codes.
        block_size: Rows of the weight that share a scale.
        transpose: Whether the product is with the transposed weight.
        form: How codes become weights; one of `decode.FORMS`.
        rows: Rows `[K]` of the weight.
        cols: Columns `[N]` of the weight.
        m: Rows of the left operand.
        tile_m: Rows of the left operand in a block.
        tile: Columns (or, transposed, rows) of the weight in a stripe.
        chunk: How much of the contracted axis one decoding step covers.
        keep: Whether the stripe is kept in scratch.
        mixed: Whether weights are decoded in the row order of `decode.mix`.
        all_scales: Whether a block holds the scales of every row (transposed only).
        vmem_limit: Bytes of VMEM that the compiler may use.
    """

    fmt: str
    block_size: int
    transpose: bool
    form: str
    rows: int
    cols: int
    m: int
    tile_m: int
    tile: int
    chunk: int
    keep: bool
    mixed: bool
    all_scales: bool
    vmem_limit: int

    @property
    def contracted(self) -> int:
        """The length of the contracted axis."""
        return self.cols if self.transpose else self.rows

    @property
    def codes_a_byte(self) -> int:
        """Codes in a byte."""
        return 1 if self.fmt == "int8" else 2

    @property
    def stripe_shape(self) -> tuple[int, int]:
        """The shape of a stripe."""
        shape = self.contracted, self.tile
        return shape[::-1] if self.transpose else shape


def decode_tile(
    plan: Plan, codes: Any, scales: Any, base: Any, start: Any, size: int, dtype: Any
) -> Array:
    """Returns a stripe's weights from `start` on, `size` of the contracted axis.

    Args:
        plan: The static facts.
        codes: Reference to the block's codes.
        scales: Reference to the block's scales.
        base: Row of the weight that the first row of `scales` counts from, backwards:
            the block's first row, when `scales` holds all rows; else 0.
        start: Where to start on the contracted axis; may be traced.
        size: How far to go.
        dtype: bfloat16 or float32.
    """
    # In pieces of a few registers: wider ones run out of them.
    first, rows = (0, plan.tile) if plan.transpose else (start, size)
    left, lanes = (start, size) if plan.transpose else (0, plan.tile)
    pieces = []
    for at in range(0, lanes, LANES):
        width = min(LANES, lanes - at)
        columns = pl.ds(_multiple(left + at, 128), width)
        pieces.append(
            _decode(plan, codes, scales, base, first, rows, columns, width, dtype)
        )
    return jnp.concatenate(pieces, axis=1)


def _decode(
    plan: Plan,
    codes: Any,
    scales: Any,
    base: Any,
    first: Any,
    rows: int,
    columns: Any,
    width: int,
    dtype: Any,
) -> Array:
    """Returns `[rows, width]` weights of the block, from row `first` on."""
    slab = decode.slab_rows(plan.fmt)
    table = decode.form_table(plan.fmt, plan.form, dtype, width)
    parts = []
    for row in range(0, rows, slab):
        own = [
            _scale_row(plan, scales, base + first + row + r, columns)
            for r in range(0, slab, min(slab, plan.block_size))
        ]
        at = _multiple(_div(first + row, plan.codes_a_byte), 32)
        part = codes[pl.ds(at, 32), columns]
        weights = decode.decode_slab(
            part, own, table, plan.form, dtype, mixed=plan.mixed
        )
        parts.append(weights)
    return jnp.concatenate(parts, axis=0)


def _scale_row(plan: Plan, scales: Any, row: Any, columns: Any) -> Array:
    """Returns the scales of a row of the weight, `[1, n]`."""
    at = _div(row, plan.block_size)
    if not plan.all_scales:
        return scales[pl.ds(at, 1), columns]
    # No load may start at a traced row and a traced column: take eight rows, aligned,
    # and rotate. Rows past the end are padding: any scale will do.
    count = plan.rows // plan.block_size
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


def _div(value: Any, by: int) -> Any:
    return value // by if isinstance(value, int) else lax.div(value, by)


def _multiple(value: Any, of: int) -> Any:
    return value if isinstance(value, int) else pl.multiple_of(value, of)


def multiply(plan: Plan, left: Array, weights: Array) -> Array:
    """Returns `left @ weights` or `left @ weights.T` in float32."""
    precise = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        weights,
        (((1,), (1 if plan.transpose else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if precise else None,
        preferred_element_type=jnp.float32,
    )


def kernel(plan: Plan, layer: Any, left: Any, codes: Any, scales: Any, out: Any, *kept):
    """The body of a grid step; see the module's docstring."""
    del layer  # only the index maps need it
    dtype = left.dtype
    base = pl.program_id(1) * plan.tile if plan.all_scales else 0

    def decoded(start, size):
        return decode_tile(plan, codes, scales, base, start, size, dtype)

    def chunk_of(at):
        return pl.ds(_multiple(at * plan.chunk, 128), plan.chunk)

    whole = plan.contracted // plan.chunk
    tail = plan.contracted % plan.chunk
    last = pl.ds(whole * plan.chunk, tail)

    if not plan.keep:
        if plan.mixed and not plan.transpose:
            (mixed,) = kept

            @pl.when(pl.program_id(1) == 0)
            def _():
                mixed[...] = decode.mix(left[...])

            left = mixed

        def add(at, total):
            span = chunk_of(at)
            return total + multiply(
                plan, left[:, span], decoded(span.start, plan.chunk)
            )

        total = jnp.zeros(out.shape, jnp.float32)
        total = _repeat(whole, add, total)
        if tail:
            total += multiply(plan, left[:, last], decoded(last.start, tail))
        total = total.astype(out.dtype)
        mixed_out = plan.mixed and plan.transpose
        out[...] = decode.mix(total, undo=True) if mixed_out else total
        return

    (stripe,) = kept

    @pl.when(pl.program_id(2) == 0)
    def _():
        def put(span, size):
            weights = decoded(span.start, size)
            if dtype == jnp.bfloat16:  # words, for a layout that takes no shuffling
                weights = pltpu.bitcast(weights, jnp.int32)
                rows = pl.ds(_multiple(_div(span.start, 2), 8), size // 2)
            else:
                rows = span
            at = (slice(None), span) if plan.transpose else (rows, slice(None))
            stripe[at] = weights

        _repeat(whole, lambda at, _: put(chunk_of(at), plan.chunk), None)
        if tail:
            put(last, tail)

    weights = stripe[...]
    if dtype == jnp.bfloat16:
        weights = pltpu.bitcast(weights, dtype)
    out[...] = multiply(plan, left[...], weights).astype(out.dtype)


def _repeat(times: int, body: Any, carry: Any) -> Any:
    """A loop, or the body alone where it would run once."""
    return body(0, carry) if times == 1 else lax.fori_loop(0, times, body, carry)


def call(
    plan: Plan, layer: Array, left: Array, codes: Array, scales: Array, interpret: Any
) -> Array:
    """Runs the kernel over left `[E, M, .]`, codes and scales `[L, E, ., N]`."""
    batch, out_cols = left.shape[0], plan.rows if plan.transpose else plan.cols
    rows_a_block = plan.rows // plan.block_size
    if plan.transpose:
        scale_rows = rows_a_block if plan.all_scales else plan.tile // plan.block_size
        codes_shape = (plan.tile // plan.codes_a_byte, plan.cols)
        scales_shape = (scale_rows, plan.cols)

        def weight_map(e, j, i, layer):
            return layer[0], e, j, 0

        def scales_map(e, j, i, layer):
            return layer[0], e, 0 if plan.all_scales else j, 0
    else:
        codes_shape = (plan.rows // plan.codes_a_byte, plan.tile)
        scales_shape = (rows_a_block, plan.tile)

        def weight_map(e, j, i, layer):
            return layer[0], e, 0, j

        scales_map = weight_map

    scratch = []
    if plan.keep:
        rows, cols = plan.stripe_shape
        packed = left.dtype == jnp.bfloat16
        scratch = [
            pltpu.VMEM((rows // 2, cols), jnp.int32)
            if packed
            else pltpu.VMEM((rows, cols), left.dtype)
        ]
    elif plan.mixed and not plan.transpose:
        scratch = [pltpu.VMEM((plan.tile_m, plan.contracted), left.dtype)]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(out_cols, plan.tile), pl.cdiv(plan.m, plan.tile_m)),
            in_specs=[
                pl.BlockSpec(
                    (None, plan.tile_m, plan.contracted), lambda e, j, i, _: (e, i, 0)
                ),
                pl.BlockSpec((None, None, *codes_shape), weight_map),
                pl.BlockSpec((None, None, *scales_shape), scales_map),
            ],
            out_specs=pl.BlockSpec(
                (None, plan.tile_m, plan.tile), lambda e, j, i, _: (e, i, j)
            ),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, plan.m, out_cols), left.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                # Left operands are mixed once, when the first stripe comes by.
                "arbitrary" if plan.mixed else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=plan.vmem_limit,
        ),
        interpret=interpret,
        name=f"qlora_{plan.fmt}_{'dx' if plan.transpose else 'fwd'}",
    )(layer, left, codes, scales)
