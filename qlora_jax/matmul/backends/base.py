"""The interface of back ends."""

import abc
from typing import Any

from jaxtyping import Array

from ..spec import ProductSpec


class Backend(abc.ABC):
    """A way to compute the product of one device's arrays.

    Every back end equals `reference.Reference`. If it `is_opaque`, XLA cannot partition
    it, as a kernel.
    """

    is_opaque = False

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: Any, columns: int
    ) -> str | None:
        """Returns why a product is not supported, or None.

        `shape` `[*batch, M, .]` and `dtype` are those of x; M may be a symbol.
        `columns` is N.
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
