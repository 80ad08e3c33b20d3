"""The static facts of a product."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..quant.formats import Format
from ..quant.placement import Placement
from ..quant.settings import Packing


@jax.tree_util.register_static
@dataclass(frozen=True)
class ProductSpec:
    """The static facts of a product of `x [*batch, *rows, K]` and packed weights.

    A pytree without leaves, so that it passes through transformations as an argument.

    Attributes:
        packing: How the weights are packed. Their scales are float32 in a product.
        dtype_name: The logical dtype, to which a weight is rounded first.
        k: Rows of the weights.
        batch: Number of batch axes.
        transpose: Whether to multiply by the transposed weights.
        backend: One back end, several to try in order, or None for the platform's.
        precision: As in `jax.lax.dot_general`.
        placement: How the weights are sharded, if that is declared.
        mesh: The mesh with Explicit axes that the operands' types name, or None.
    """

    packing: Packing
    dtype_name: str
    k: int
    batch: int = 0
    transpose: bool = False
    backend: str | tuple[str, ...] | None = None
    precision: Any = None
    placement: Placement | None = None
    mesh: Any = None

    @property
    def format(self) -> Format:
        """The number format itself."""
        return self.packing.format

    @property
    def block_size(self) -> int:
        """Rows of the weights that share a scale."""
        return self.packing.block_size

    @property
    def dtype(self) -> Any:
        """The logical dtype."""
        return jnp.dtype(self.dtype_name)

    def transposed(self) -> "ProductSpec":
        """The product with the transposed weights: that of the input gradient."""
        return replace(self, transpose=not self.transpose)
