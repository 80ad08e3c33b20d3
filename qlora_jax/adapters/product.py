"""The product of an adapted kernel."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from ..matmul.floats import float_product
from ..matmul.quantized import matmul
from ..matmul.ragged import ragged_float_product, ragged_matmul
from ..quant.kernel import Kernel, PackedInput
from .base import Adapter


def adapted_product(
    x: Float[Array, "..."],
    kernel: Kernel,
    lora: Adapter | None = None,
    dropout_key: Any = None,
    backend: str | tuple[str, ...] | None = None,
    precision: Any = None,
    offsets: Array | None = None,
    result: Any = None,
) -> Float[Array, "..."]:
    """Returns the product of x `[*batch, ..., K]` with a kernel and its adapter.

    In the dtype of `x`. For one layer of a stack, the adapter is that layer's. With
    `offsets`, those of a ragged product, x is `[M, K]`, and `result` may be another
    dtype of the result.
    """
    if lora is not None:
        settings = {"backend": backend, "precision": precision}
        settings |= {"offsets": offsets, "result": result}
        multiply = functools.partial(adapted_product, **settings)
        if offsets is None:
            return lora.product(x, kernel, multiply, dropout_key, precision)
        return lora.ragged_product(x, kernel, multiply, offsets, dropout_key, precision)
    w = kernel.product_input(x.dtype)
    if offsets is not None:
        if isinstance(w, PackedInput):
            return ragged_matmul(x, w, offsets, backend, precision, result)
        return ragged_float_product(x, w, offsets, precision, result, kernel.placement)
    if isinstance(w, PackedInput):
        return matmul(x, w.q, layer=w.layer, backend=backend, precision=precision)
    return float_product(x, w, precision).astype(x.dtype)


# Layers of one shape are traced once: in a model that unrolls its layers, tracing is
# half the cost of adapters.
product = jax.jit(adapted_product, static_argnames=("backend", "precision", "result"))
