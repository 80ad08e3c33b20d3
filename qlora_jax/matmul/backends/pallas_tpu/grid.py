"""The kernel: decode a tile of the weight in VMEM, multiply, repeat.

The contracted axis is not cut by the grid, so that one decoded *stripe* of the weight
(a tile of its output axis, all of the contracted axis) serves every block of rows of
the left operand. With one such block, each decoded chunk goes to the matrix unit at
once. With more, the stripe is decoded at the first block and stays in VMEM scratch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import decode
from .stripe import decode_stripe, divide, multiple
from .tiling import Tiling


def call(
    plan: Tiling, layer: Array, left: Array, codes: Array, scales: Array, interpret: Any
) -> Array:
    """Runs the kernel on padded arrays, for weight `layer` (int32 `[1]`) of `L`.

    Left is `[E, M, .]`, codes uint8 `[L, E, ., N]`, scales float32 `[E, ., N]` of that
    weight. Returns `[E, M, .]` in `plan.spec.result`, or the dtype of `left`.
    """
    result = jnp.dtype(plan.spec.result or left.dtype)
    plan = dataclasses.replace(plan, emulate=interpret is not False)
    batch, out_cols = left.shape[0], plan.rows if plan.spec.transpose else plan.cols
    left_block = pl.BlockSpec(
        (None, plan.tile_m, plan.contracted), lambda e, j, i, _: (e, i, 0)
    )
    out_block = pl.BlockSpec(
        (None, plan.tile_m, plan.tile), lambda e, j, i, _: (e, i, j)
    )
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(out_cols, plan.tile), pl.cdiv(plan.m, plan.tile_m)),
            in_specs=[left_block, *weight_blocks(plan)],
            out_specs=out_block,
            scratch_shapes=scratch(plan, left.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, plan.m, out_cols), result),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                # Left operands are mixed once, at the first stripe.
                "arbitrary" if plan.mixed else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=plan.vmem_limit,
        ),
        interpret=interpret,
        name=f"qlora_{plan.spec.packing.fmt}_{'dx' if plan.spec.transpose else 'fwd'}",
    )(layer, left, codes, scales)


def weight_blocks(plan: Tiling) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """The blocks of codes and scales: what a stripe needs of one layer's weight."""
    rows, cols = plan.stripe_shape
    at = lambda j: (j, 0) if plan.spec.transpose else (0, j)
    codes = pl.BlockSpec(
        (None, None, rows // plan.spec.format.codes_per_byte, cols),
        lambda e, j, i, layer: (layer[0], e, *at(j)),
    )
    scale_rows = (plan.rows if plan.all_scales else rows) // plan.spec.block_size
    scales = pl.BlockSpec(
        (None, scale_rows, cols),
        lambda e, j, i, _: (e, 0, 0) if plan.all_scales else (e, *at(j)),
    )
    return codes, scales


def scratch(plan: Tiling, dtype: Any) -> list[Any]:
    """The stripe, in words if it is bfloat16; or the left operand, mixed."""
    if plan.keep:
        rows, cols = plan.stripe_shape
        if dtype == jnp.bfloat16:
            # The layout of words takes a decoded register as it is; that of bfloat16
            # would halve and join it, four operations for 64 rows.
            return [pltpu.VMEM((rows // 2, cols), jnp.int32)]
        return [pltpu.VMEM((rows, cols), dtype)]
    if plan.mixed and not plan.spec.transpose:
        return [pltpu.VMEM((plan.tile_m, plan.contracted), dtype)]
    return []


def _kernel(plan: Tiling, *refs: Any) -> None:
    """The body of a grid step; see the module's docstring."""
    # Only the index maps need the layer.
    _, left, codes, scales, out, *scratch = refs
    stripe, first = pl.program_id(1), pl.program_id(2) == 0
    out[...] = block(plan, left, codes, scales, scratch, stripe, first).astype(
        out.dtype
    )


def block(
    plan: Tiling,
    left: Any,
    codes: Any,
    scales: Any,
    scratch: list[Any],
    stripe: Any,
    is_first: Any,
) -> Array:
    """Returns the product of a block of the left operand with a stripe, in float32.

    `is_first` says whether it is the first block of rows for this stripe of a weight.
    """
    base = stripe * plan.tile if plan.all_scales else 0

    def weights(start: Any, size: int) -> Array:
        return decode_stripe(plan, codes, scales, base, start, size, left.dtype)

    if plan.keep:
        return _keep(plan, left, weights, scratch[0], is_first)
    return _pass(plan, left, weights, scratch, (stripe == 0) & is_first)


def _pass(
    plan: Tiling, left: Any, weights: Any, scratch: list[Any], is_first: Any
) -> Array:
    """Multiplies each chunk of the stripe as it is decoded."""
    if scratch:
        (mixed,) = scratch

        @pl.when(is_first)
        def _() -> None:
            mixed[...] = decode.mix(left[...])

        left = mixed

    def add(start: Any, size: int, total: Array) -> Array:
        return total + _multiply(
            plan, left[:, pl.ds(start, size)], weights(start, size)
        )

    total = jnp.zeros((plan.tile_m, plan.tile), jnp.float32)
    total = _for_each_chunk(plan, add, total)
    if plan.mixed and plan.spec.transpose:
        total = decode.mix(total.astype(plan.spec.result or left.dtype), undo=True)
    return total


def _keep(plan: Tiling, left: Any, weights: Any, stripe: Any, is_first: Any) -> Array:
    """Decodes the stripe at the first block of rows; multiplies by all of it."""
    packed = left.dtype == jnp.bfloat16

    def put(start: Any, size: int, carry: None) -> None:
        values = weights(start, size)
        if packed:
            values = pltpu.bitcast(values, jnp.int32)
        if plan.spec.transpose:
            stripe[:, pl.ds(start, size)] = values
        else:
            first = multiple(divide(start, 2), 8) if packed else start
            stripe[pl.ds(first, values.shape[0]), :] = values
        return carry

    @pl.when(is_first)
    def _() -> None:
        _for_each_chunk(plan, put, None)

    values = stripe[...]
    if packed:
        values = pltpu.bitcast(values, left.dtype)
    return _multiply(plan, left[...], values)


def _for_each_chunk(plan: Tiling, body: Any, carry: Any) -> Any:
    """Calls `carry = body(start, size, carry)` along the contracted axis."""
    whole, tail = divmod(plan.contracted, plan.chunk)

    def step(at: Any, carry: Any) -> Any:
        return body(multiple(at * plan.chunk, 128), plan.chunk, carry)

    carry = step(0, carry) if whole == 1 else lax.fori_loop(0, whole, step, carry)
    return body(whole * plan.chunk, tail, carry) if tail else carry


def _multiply(plan: Tiling, left: Array, weights: Array) -> Array:
    """Returns `left @ weights` or `left @ weights.T` in float32."""
    return lax.dot_general(
        left,
        weights,
        (((1,), (1 if plan.spec.transpose else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
