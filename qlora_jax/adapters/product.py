"""The product of an adapted kernel, and the kernel with the adapter merged in."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from ..matmul.floats import float_product
from ..matmul.quantized import matmul
from ..quant.kernel import Kernel, PackedInput
from .base import Adapter


def base_product(
    x: Float[Array, "..."],
    kernel: Kernel,
    *,
    backend: str | tuple[str, ...] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Returns `x W` for x `[*batch, ..., K]`, in the dtype of `x`."""
    w = kernel.product_input(x.dtype)
    if isinstance(w, PackedInput):
        return matmul(x, w.q, layer=w.layer, backend=backend, precision=precision)
    return float_product(x, w, precision).astype(x.dtype)


# Jitted so that layers of one shape are traced once: in a model that unrolls its
# layers, tracing is half the cost of adapters.
@functools.partial(jax.jit, static_argnames=("backend", "precision"))
def product(
    x: Float[Array, "..."],
    kernel: Kernel,
    lora: Adapter | None,
    *,
    dropout_key: Any = None,
    backend: str | tuple[str, ...] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    """Returns the product of an adapted kernel in matrix form, in the dtype of `x`.

    For one layer of a stack, the adapter is that layer's.
    """
    multiply = functools.partial(base_product, backend=backend, precision=precision)
    if lora is None:
        return multiply(x, kernel)
    return lora.product(
        x, kernel, multiply, dropout_key=dropout_key, precision=precision
    )


def effective_kernel(kernel: Kernel, lora: Adapter | None) -> Float[Array, "..."]:
    """Returns the weights of an adapted kernel, in its own shape and dtype."""
    return kernel.dequantize() if lora is None else lora.merged(kernel)
