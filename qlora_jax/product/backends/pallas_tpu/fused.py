"""The fused TPU kernel: `x @ W` and `g @ W.T` from packed codes, without W in HBM.

The grid does not split the contracted axis. A decoded *stripe* of the weight (a tile of
its output axis, over the full contracted axis) thus serves all blocks of rows of the
left operand. If there is only one such block, each decoded chunk is multiplied
immediately. Otherwise, the stripe is decoded at the first block and stays in VMEM.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import PyTree

from ...spec import ProductSpec
from . import decode
from .tiling import Chip, Tiling, plan

# `decode_chunk(start, size)` returns weights of a stripe, from positions `start` to
# `start + size` of the contracted axis.
DecodeChunk = Callable[[Array | int, int], Array]


@functools.partial(jax.jit, static_argnames=("chip", "interpret"))
def product(
    spec: ProductSpec,
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array | None = None,
    *,
    chip: Chip,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Returns `x @ W` or `x @ W.T`, summed in float32.

    The dtype of the result is `spec.result_dtype`.

    x is `[M, .]`, codes uint8 `[K/2, N]` (int8: `[K, N]`), scales float32 `[K/B, N]`. A
    batch of weights, such as experts, adds an axis `E` in front of each. With a
    `layer`, an int32 scalar, codes also have an axis `L` in front, and the kernel reads
    the layer without slicing the stack.
    """
    has_experts = x.ndim == 3
    if layer is None:
        codes, layer = codes[None], jnp.int32(0)
    if not has_experts:
        x, codes, scales = x[None], codes[:, None], scales[None]
    rows, cols = codes.shape[2] * spec.format.codes_per_byte, codes.shape[3]
    tiling = plan(spec, x.shape[1], cols, x.dtype, chip)
    if scales.shape != (codes.shape[1], rows // spec.block_size, cols):
        raise ValueError(
            f"`scales` must have a row for every {spec.block_size} weight rows. Got "
            f"shapes {scales.shape} of `scales` and {codes.shape} of `codes`."
        )
    outputs = rows if spec.transpose else cols
    if x.size == 0:
        out = jnp.zeros((*x.shape[:2], outputs), spec.result_dtype)
    else:
        x, scales = pad(tiling, x, scales)
        layer = jnp.asarray(layer, jnp.int32).reshape(1)
        out = call(tiling, layer, x, codes, scales, interpret)[..., :outputs]
    return out if has_experts else out[0]


def pad(tiling: Tiling, x: Array, scales: Array) -> tuple[Array, Array]:
    """Pads the contracted axis of x and of the scales with zeros."""
    # Codes are not padded, because this would copy them. A block of codes may extend
    # beyond the array, but the weights that the kernel decodes there have zero scales.

    def pad_to(array: Array, rows: int, cols: int) -> Array:
        widths = [(0, 0)] * (array.ndim - 2)
        widths += [(0, rows - array.shape[-2]), (0, cols - array.shape[-1])]
        return jnp.pad(array, widths)

    return (
        pad_to(x, x.shape[-2], tiling.contracted),
        pad_to(scales, tiling.rows // tiling.spec.block_size, tiling.cols),
    )


def call(
    tiling: Tiling,
    layer: Array,
    left: Array,
    codes: Array,
    scales: Array,
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    """Runs the kernel on padded arrays, for layer `layer` (int32 `[1]`) of the codes.

    Left is `[E, M, .]`, codes uint8 `[L, E, ., N]`, scales float32 `[E, ., N]` of this
    layer. Returns `[E, M, .]` in `spec.result_dtype`.
    """
    spec = tiling.spec
    result_dtype = spec.result_dtype
    tiling = dataclasses.replace(tiling, emulate=interpret is not False)
    batch, out_cols = left.shape[0], tiling.rows if spec.transpose else tiling.cols
    # Grid indices: expert e, stripe j and block of rows i.
    left_block = pl.BlockSpec(
        (None, tiling.tile_m, tiling.contracted), lambda e, j, i, layer: (e, i, 0)
    )
    out_block = pl.BlockSpec(
        (None, tiling.tile_m, tiling.tile), lambda e, j, i, layer: (e, i, j)
    )
    num_stripes = pl.cdiv(out_cols, tiling.tile)
    return pl.pallas_call(
        functools.partial(_kernel, tiling),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_stripes, pl.cdiv(tiling.m, tiling.tile_m)),
            in_specs=[left_block, *weight_blocks(tiling)],
            out_specs=out_block,
            scratch_shapes=scratch_shapes(tiling, left.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, tiling.m, out_cols), result_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                # Left operands are mixed once, at the first stripe, so the order of
                # stripes matters.
                "arbitrary" if tiling.mixed else "parallel",
                "arbitrary",
            ),
            vmem_limit_bytes=tiling.vmem_limit,
        ),
        interpret=interpret,
        name=f"qlora_{spec.format.name}_{'dx' if spec.transpose else 'fwd'}",
    )(layer, left, codes, scales)


def weight_blocks(tiling: Tiling) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Returns the specs of the blocks of codes and scales for a stripe."""
    spec, (rows, cols) = tiling.spec, tiling.stripe_shape

    def stripe_index(j: Array) -> tuple[Array | int, Array | int]:
        return (j, 0) if spec.transpose else (0, j)

    codes = pl.BlockSpec(
        (None, None, rows // spec.format.codes_per_byte, cols),
        lambda e, j, i, layer: (layer[0], e, *stripe_index(j)),
    )
    scale_rows = (tiling.rows if tiling.all_scales else rows) // spec.block_size
    scales = pl.BlockSpec(
        (None, scale_rows, cols),
        lambda e, j, i, layer: (
            (e, 0, 0) if tiling.all_scales else (e, *stripe_index(j))
        ),
    )
    return codes, scales


def scratch_shapes(tiling: Tiling, dtype: np.dtype) -> list:
    """Returns the scratch shapes: for a kept stripe, or for a mixed left operand."""
    if tiling.keep:
        rows, cols = tiling.stripe_shape
        if dtype == jnp.bfloat16:
            # As int32 words, a decoded register can be stored without changes. In the
            # bfloat16 layout, it would have to be split and joined, which takes four
            # operations for 64 rows.
            return [pltpu.VMEM((rows // 2, cols), jnp.int32)]
        return [pltpu.VMEM((rows, cols), dtype)]
    if tiling.mixed and not tiling.spec.transpose:
        return [pltpu.VMEM((tiling.tile_m, tiling.contracted), dtype)]
    return []


def _kernel(tiling: Tiling, *refs: jax.Ref) -> None:
    # Runs one step of the grid. Only the index maps read the layer.
    _, left, codes, scales, out, *scratch = refs
    stripe, is_first = pl.program_id(1), pl.program_id(2) == 0
    y = multiply_block(tiling, left, codes, scales, scratch, stripe, is_first)
    out[...] = y.astype(out.dtype)


def multiply_block(
    tiling: Tiling,
    left: jax.Ref,
    codes: jax.Ref,
    scales: jax.Ref,
    scratch: Sequence[jax.Ref],
    stripe: Array,
    is_first: Array,
) -> Array:
    """Returns the product of a block of the left operand with a stripe, in float32.

    `is_first` is whether this is the first block of rows for the stripe.
    """
    row_offset = stripe * tiling.tile if tiling.all_scales else 0

    def decode_chunk(start: Array | int, size: int) -> Array:
        return decode.decode_stripe(
            tiling, codes, scales, row_offset, start, size, left.dtype
        )

    if tiling.keep:
        return _multiply_kept(tiling, left, decode_chunk, scratch[0], is_first)
    is_first_of_all = (stripe == 0) & is_first
    return _multiply_chunks(tiling, left, decode_chunk, scratch, is_first_of_all)


def _multiply_chunks(
    tiling: Tiling,
    left: jax.Ref,
    decode_chunk: DecodeChunk,
    scratch: Sequence[jax.Ref],
    is_first: Array,
) -> Array:
    """Multiplies each chunk of the stripe as soon as it is decoded."""
    if scratch:
        (mixed,) = scratch

        @pl.when(is_first)
        def mix_left() -> None:
            mixed[...] = decode.mix(left[...])

        left = mixed

    def add_chunk(start: Array | int, size: int, total: Array) -> Array:
        left_chunk = left[:, pl.ds(start, size)]
        return total + _multiply(tiling, left_chunk, decode_chunk(start, size))

    total = jnp.zeros((tiling.tile_m, tiling.tile), jnp.float32)
    total = _for_each_chunk(tiling, add_chunk, total)
    if tiling.mixed and tiling.spec.transpose:
        # Outputs are in the mixed order, because they are rows of the weight.
        dtype = tiling.spec.result_dtype
        total = decode.mix(total.astype(dtype), undo=True)
    return total


def _multiply_kept(
    tiling: Tiling,
    left: jax.Ref,
    decode_chunk: DecodeChunk,
    stripe: jax.Ref,
    is_first: Array,
) -> Array:
    """Decodes the stripe at the first block of rows, and multiplies by all of it."""
    is_packed = left.dtype == jnp.bfloat16  # two rows in a word

    def store_chunk(start: Array | int, size: int, carry: None) -> None:
        values = decode_chunk(start, size)
        if is_packed:
            values = pltpu.bitcast(values, jnp.int32)
        if tiling.spec.transpose:
            stripe[:, pl.ds(start, size)] = values
        else:
            first = start
            if is_packed:
                first = decode.assume_multiple(decode.divide(start, 2), 8)
            stripe[pl.ds(first, values.shape[0]), :] = values
        return carry

    @pl.when(is_first)
    def fill_stripe() -> None:
        _for_each_chunk(tiling, store_chunk, None)

    values = stripe[...]
    if is_packed:
        values = pltpu.bitcast(values, left.dtype)
    return _multiply(tiling, left[...], values)


def _for_each_chunk(
    tiling: Tiling, body: Callable[[Array | int, int, PyTree], PyTree], carry: PyTree
) -> PyTree:
    """Calls `carry = body(start, size, carry)` along the contracted axis."""
    num_chunks, last_size = divmod(tiling.contracted, tiling.chunk)

    def step(i: Array | int, carry: PyTree) -> PyTree:
        start = decode.assume_multiple(i * tiling.chunk, 128)
        return body(start, tiling.chunk, carry)

    if num_chunks == 1:
        carry = step(0, carry)
    else:
        carry = lax.fori_loop(0, num_chunks, step, carry)
    return body(num_chunks * tiling.chunk, last_size, carry) if last_size else carry


def _multiply(tiling: Tiling, left: Array, weights: Array) -> Array:
    # `left @ weights`, or `left @ weights.T`: the matrix unit accepts a transposed
    # operand.
    return lax.dot_general(
        left,
        weights,
        (((1,), (1 if tiling.spec.transpose else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
