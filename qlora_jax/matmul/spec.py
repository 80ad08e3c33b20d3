"""What is static about a product: one record, from `matmul` down to the kernels."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..quant.formats import Format, get_format
from ..quant.placement import Placement


@jax.tree_util.register_static
@dataclass(frozen=True)
class ProductSpec:
    """The static facts of a product of `x [*batch, *rows, K]` and packed weights.

    A pytree without leaves, so that it passes through transformations as an argument.

    Attributes:
        fmt: Name of the weights' number format.
        block_size: Rows of the weights that share a scale.
        dtype_name: The logical dtype, to which a weight is rounded first.
        k: Rows of the weights.
        batch: Number of batch axes.
        transpose: Whether to multiply by the transposed weights.
        backend: The back end that is asked for, or several to try in order; None to
            choose one.
        precision: As in `jax.lax.dot_general`.
        placement: How the weights are sharded, if that is declared.
    """

    fmt: str
    block_size: int
    dtype_name: str
    k: int
    batch: int = 0
    transpose: bool = False
    backend: str | tuple[str, ...] | None = None
    precision: Any = None
    placement: Placement | None = None

    @property
    def format(self) -> Format:
        """The number format itself."""
        return get_format(self.fmt)

    @property
    def dtype(self) -> Any:
        """The logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def codes_per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.format.bits

    def transposed(self) -> "ProductSpec":
        """The product with the transposed weights: that of the input gradient."""
        return replace(self, transpose=not self.transpose)
