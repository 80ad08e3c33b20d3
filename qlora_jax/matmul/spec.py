"""The static facts of a product."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..quant.formats import Format
from ..quant.placement import Placement
from ..quant.settings import Packing


class Operands(NamedTuple):
    """The arrays of a product."""

    x: Array  # `[*batch, *rows, .]`; a back end gets one axis of rows, `[*batch, M, .]`
    codes: Array  # uint8 `[*batch, ., N]`, or `[L, *batch, ., N]` if there is a layer
    scales: Array  # float32 `[*batch, blocks, N]`, those of the layer
    layer: Array | None
    # Of a ragged product, int32 `[E + 1]`: x is `[M, .]`, and rows `offsets[e]` to
    # `offsets[e + 1]` are multiplied by expert e. Results of other rows are zero.
    offsets: Array | None = None


@jax.tree_util.register_static
@dataclass(frozen=True)
class ProductSpec:
    """The static facts of a product of `x [*batch, *rows, K]` and packed weights.

    A pytree without leaves, so that it passes through transformations as an argument.
    """

    packing: Packing  # its scales are float32 in a product
    dtype_name: str  # the logical dtype, to which a weight is rounded first
    k: int  # rows of the weights
    batch: int = 0  # number of batch axes, without that of experts
    transpose: bool = False  # whether to multiply by the transposed weights
    backend: str | tuple[str, ...] | None = None  # None: the platform's
    precision: Any = None
    placement: Placement | None = None  # of the weights, if declared
    mesh: Any = None  # with Explicit axes, from the types of operands
    is_ragged: bool = False  # whether rows are multiplied by experts `[E, K, N]`
    result: str | None = None  # dtype of the result; None for that of x

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
