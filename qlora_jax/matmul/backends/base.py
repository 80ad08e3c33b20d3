"""What a back end is."""

import abc
from typing import Any

from jaxtyping import Array

from ..spec import ProductSpec


class Backend(abc.ABC):
    """A way to compute the product of one device's arrays.

    Every back end equals `reference.Reference`. It takes plain arrays and the
    `ProductSpec`, never a QTensor.

    Attributes:
        is_opaque: Whether XLA must not partition it, as a kernel, which it cannot.
    """

    is_opaque = False

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: Any, columns: int
    ) -> str | None:
        """Says why the back end does not support a product, or returns None.

        Args:
            spec: The product.
            shape: That of x, `[*batch, M, .]`; M may be a symbol.
            dtype: That of x.
            columns: N of the codes.
        """
        del spec, shape, dtype, columns
        return None

    @abc.abstractmethod
    def product(
        self,
        spec: ProductSpec,
        x: Array,
        codes: Array,
        scales: Array,
        layer: Array | None,
    ) -> Array:
        """Returns `x @ W` or `x @ W^T`, in the dtype of `x`.

        Args:
            spec: The product.
            x: `[*batch, M, .]`.
            codes: `[*batch, ., N]`, or `[L, *batch, ., N]` if there is a layer.
            scales: `[*batch, blocks, N]` in float32, those of the layer.
            layer: Which kernel of the stack, or None.
        """
