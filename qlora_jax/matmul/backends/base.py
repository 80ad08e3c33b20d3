"""The interface of back ends."""

import abc
from typing import Any

from jaxtyping import Array

from ..spec import Operands, ProductSpec


class Backend(abc.ABC):
    """A way to compute the product of one device's arrays, equal to `Reference`."""

    is_opaque = False  # whether XLA cannot partition it, as a kernel

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
    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns `x @ W` or `x @ W^T` for x `[*batch, M, .]`.

        In `spec.result`, or the dtype of `x`.
        """

    @abc.abstractmethod
    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns the product of each row of x `[M, .]` with its expert's weights.

        In `spec.result`, or the dtype of `x`.
        """
