"""The reference product: dequantize, then dot. Other back ends give its results."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from ..._jax.pytree import take_layer
from ...quant.codes import dequantize_blocks, select_values
from ...quant.qtensor import round_to
from ..spec import Backend, Operands, ProductSpec
from .grouped import grouped_product

# On one device, bfloat16 results of at least this many elements are rounded by the
# multiplication itself: the vendor's GEMM of a GPU then needs no second kernel. If a
# result has too few tiles to keep the GPU busy, the GEMM may split each sum and round
# the partial sums. This is 512 tiles of 128 x 256, about 4 per multiprocessor.
SMALLEST_ROUNDED = 2**24

# Returns the codes and the scales of an expert.
TakeExpert = Callable[[Array], tuple[Array, Array]]


def accumulator_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the dtype in which products of `dtype` are summed: float32 or float64."""
    # NumPy promotes here: in its strict mode, JAX raises an error for mixed dtypes.
    return np.promote_types(dtype, np.float32)


def dot(
    x: Float[Array, "..."] | np.ndarray,
    w: Float[Array, "..."] | np.ndarray,
    *,
    transpose: bool,
    precision: PrecisionLike,
    result_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch outputs"]:
    """Returns `x @ w` or `x @ w^T` over equal batch axes, summed in float32 or more.

    The dtype of the result is `result_dtype`, or else the dtype of the sum.
    """
    batch = tuple(range(w.ndim - 2))
    contracted = w.ndim - 1 if transpose else w.ndim - 2
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (contracted,)), (batch, batch)),
        precision=precision,
        preferred_element_type=result_dtype or accumulator_dtype(x.dtype),
    )


def decode(
    spec: ProductSpec,
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    dtype: np.dtype,
    find_values: Callable = select_values,
    round_weights: Callable = round_to,
) -> Float[Array, "*batch k n"]:
    """Returns the weights in `dtype`, rounded to `spec.dtype` first."""
    w = dequantize_blocks(codes, scales, spec.format, find_values)
    return round_weights(w, spec.dtype, dtype)


def _dot(spec: ProductSpec, x: Array, w: Array) -> Array:
    dtype = accumulator_dtype(x.dtype)
    rows, outputs = math.prod(x.shape[:-1]), w.shape[-2 if spec.transpose else -1]
    is_known = not export.is_symbolic_dim(rows)
    is_large = is_known and rows * outputs >= SMALLEST_ROUNDED
    if spec.is_local and is_large and x.dtype == jnp.bfloat16:
        dtype = spec.result_dtype
    transpose, precision = spec.transpose, spec.precision
    return dot(x, w, transpose=transpose, precision=precision, result_dtype=dtype)


class Reference(Backend):
    """Decodes all weights, and then multiplies."""

    def product(self, spec: ProductSpec, operands: Operands) -> Array:  # noqa: D102
        x, codes, scales, layer, _ = operands
        if layer is not None:
            codes = take_layer(codes, layer)
        # Without the barrier, XLA decodes every layer of a Python loop before the first
        # product.
        x, codes, scales = lax.optimization_barrier((x, codes, scales))
        w = decode(spec, codes, scales, x.dtype)
        return _dot(spec, x, w).astype(spec.result_dtype)

    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:  # noqa: D102
        x, codes, scales, layer, offsets = operands
        assert offsets is not None
        num_experts, first_expert = scales.shape[0], 0
        if layer is not None:
            # Experts are sliced from `[L * E, ., N]`, so that no whole layer is copied.
            codes = codes.reshape(-1, *codes.shape[-2:])
            first_expert = layer * num_experts

        def take_expert(expert: Array) -> tuple[Array, Array]:
            return take_layer(codes, first_expert + expert), take_layer(scales, expert)

        return self._multiply_experts(spec, x, take_expert, offsets, scales.shape[-1])

    def _multiply_experts(
        self,
        spec: ProductSpec,
        x: Array,
        take_expert: TakeExpert,
        offsets: Array,
        n: int,
    ) -> Array:
        return grouped_product(
            x,
            offsets,
            lambda expert: decode(spec, *take_expert(expert), x.dtype),
            functools.partial(_dot, spec),
            spec.k if spec.transpose else n,
            spec.result_dtype,
        )
