"""The definition of the product: dequantize, then dot. Other back ends equal it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import export, lax
from jaxtyping import Array, Float, Float32, UInt8

from ..._jax.pytree import take_layer
from ...quant.codes import dequantize_blocks, select_values
from ...quant.qtensor import round_to
from ..spec import Operands, ProductSpec
from .base import Backend
from .grouped import grouped_product

# Returns the codes and the scales of an expert.
Take = Callable[[Array], tuple[Array, Array]]


def accumulator_dtype(dtype: Any) -> Any:
    """The dtype in which products of `dtype` are summed: float32, or float64."""
    # NumPy's promotion: JAX refuses this one where promotion is strict.
    return np.promote_types(dtype, np.float32)


def dot(
    x: Any, w: Any, *, transpose: bool, precision: Any, result: Any = None
) -> Float[Array, "*batch outputs"]:
    """Returns `x @ w` or `x @ w^T` over matching batch axes, summed in float32.

    In the dtype of the sum, or in `result`. A constant may be a NumPy array here.
    """
    batch = tuple(range(w.ndim - 2))
    contract = w.ndim - 1 if transpose else w.ndim - 2
    return lax.dot_general(
        x,
        w,
        (((x.ndim - 1,), (contract,)), (batch, batch)),
        precision=precision,
        preferred_element_type=result or accumulator_dtype(x.dtype),
    )


def decode(
    spec: ProductSpec,
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    dtype: Any,
    k: int | None = None,
    look_up: Callable = select_values,
    round_to: Callable = round_to,
) -> Float[Array, "*batch k n"]:
    """Returns weights (`k` rows, or all) in `dtype`, rounded to `spec.dtype` first."""
    k = spec.k if k is None else k
    w = dequantize_blocks(codes, scales, spec.packing, k, look_up)
    return round_to(w, spec.dtype, dtype)


class Reference(Backend):
    """Decodes all weights, then multiplies."""

    def _result(self, dtype: Any) -> Any:
        """The dtype that the multiplication itself writes, for x of a dtype."""
        return accumulator_dtype(dtype)

    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.product`."""
        x, codes, scales, layer, _ = operands
        if layer is not None:
            codes = take_layer(codes, layer)
        # Else XLA decodes every layer of a Python loop before the first product.
        x, codes, scales = lax.optimization_barrier((x, codes, scales))
        return self._multiply(spec, x, codes, scales)

    def _multiply(
        self, spec: ProductSpec, x: Array, codes: Array, scales: Array
    ) -> Array:
        w = decode(spec, codes, scales, x.dtype)
        settings = {"transpose": spec.transpose, "precision": spec.precision}
        result = spec.result or self._result(x.dtype)
        return dot(x, w, **settings, result=result).astype(spec.result or x.dtype)

    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:
        """See `Backend.ragged_product`."""
        x, codes, scales, layer, offsets = operands
        assert offsets is not None
        experts, first = scales.shape[0], 0
        if layer is not None:  # each expert is cut out of the whole stack
            codes, first = codes.reshape(-1, *codes.shape[-2:]), layer * experts

        def take(e: Array) -> tuple[Array, Array]:
            return take_layer(codes, first + e), take_layer(scales, e)

        return self._ragged(spec, x, take, offsets, scales.shape[-1])

    def _ragged(
        self, spec: ProductSpec, x: Array, take: Take, offsets: Array, n: int
    ) -> Array:
        """As `ragged_product`."""
        settings = {"transpose": spec.transpose, "precision": spec.precision}
        result = self._result(x.dtype)
        multiply = lambda x, w: dot(x, w, **settings, result=spec.result or result)
        weights = lambda e: decode(spec, *take(e), x.dtype)
        outputs = spec.k if spec.transpose else n
        dtype = spec.result or x.dtype
        return grouped_product(x, offsets, weights, multiply, outputs, dtype)


class Rounding(Reference):
    """As `Reference`, but the multiplication itself rounds its sums to bfloat16."""

    # On a GPU that is the vendor's GEMM, with no second kernel to round. Where a result
    # has too few tiles to keep the GPU busy, it may cut sums and round their parts.
    is_opaque = True  # XLA would add rounded parts of a sum that it partitions
    smallest = 2**24  # elements: 512 tiles of 128 x 256, about four for each processor

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: Any, columns: int
    ) -> str | None:
        """See `Backend.refusal`."""
        if dtype != np.dtype("bfloat16"):
            return f"It is for inputs in bfloat16. Got {dtype}."
        outputs = spec.k if spec.transpose else columns
        rows = math.prod(shape[:-1])
        if export.is_symbolic_dim(rows):
            return "It needs to know how many rows there are."
        if rows * outputs < self.smallest:
            return (
                f"It is for results of {self.smallest} elements or more. Got "
                f"{rows} x {outputs}."
            )
        return None

    def _result(self, dtype: Any) -> Any:
        return dtype
