"""The static description of a product, and the interface of its back ends."""

import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import Array

from .._jax.specs import AnyMesh
from ..quant.formats import Format, Packing
from ..quant.kernel import Placement
from ..quant.qtensor import QTensor


class Operands(NamedTuple):
    """The arrays of a product. A dot in a shape is a contracted or a packed axis."""

    # `[*batch, *rows, .]`. A back end gets a single axis of rows, `[*batch, M, .]`.
    x: Array
    codes: Array  # uint8 `[*batch, ., N]`, or `[L, *batch, ., N]` with a layer index
    scales: Array  # float32 `[*batch, blocks, N]`, always of a single layer
    layer: Array | None
    # For a ragged product, int32 `[E + 1]`: x is `[M, .]`, and its rows `offsets[e]` to
    # `offsets[e + 1]` are multiplied by expert e. Rows without an expert give zeros.
    offsets: Array | None = None


@jax.tree_util.register_static
@dataclass(frozen=True)
class ProductSpec:
    """Describes the product of `x [*batch, *rows, K]` with packed weights.

    It is a pytree without leaves, so transformations accept it as an argument.
    """

    packing: Packing  # with float32 scales, as products receive them
    dtype_name: str  # the logical dtype; decoded weights are rounded to it
    k: int  # the number of rows of the weights
    batch: int = 0  # the number of batch axes, not counting experts
    transpose: bool = False  # whether to multiply by the transposed weights
    backend: str | tuple[str, ...] | None = None  # None selects by platform
    precision: PrecisionLike = None
    placement: Placement | None = None  # of the weights, if declared
    mesh: AnyMesh | None = None  # with Explicit axes, from the operands' types
    is_ragged: bool = False  # whether rows are multiplied by experts `[E, K, N]`
    result: str | None = None  # the dtype of the result; None for the dtype of x

    @property
    def format(self) -> Format:
        """The number format itself."""
        return self.packing.format

    @property
    def block_size(self) -> int:
        """The number of rows of the weights that share a scale."""
        return self.packing.block_size

    @property
    def dtype(self) -> np.dtype:
        """The logical dtype."""
        return jnp.dtype(self.dtype_name)


def product_spec(q: QTensor) -> ProductSpec:
    """Returns the spec of products with a kernel, with default options."""
    *batch, k, _ = q.matrix_shape
    packing = replace(q.packing, double_quant=False)
    return ProductSpec(packing, q.dtype_name, k, len(batch), placement=q.placement)


class Backend(abc.ABC):
    """Computes the product of one device's arrays, with the same result as `Reference`.

    The result has the dtype `spec.result`, or else the dtype of x.
    """

    is_opaque = False  # whether XLA cannot or must not partition it

    def refusal(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: np.dtype, columns: int
    ) -> str | None:
        """Returns the reason why a product is not supported, or None if it is.

        `shape` `[*batch, M, .]` and `dtype` are those of x, where M may be symbolic.
        `columns` is N.
        """
        del spec, shape, dtype, columns
        return None

    @abc.abstractmethod
    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns `x @ W` or `x @ W^T` for x `[*batch, M, .]`."""

    @abc.abstractmethod
    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns the product of each row of x `[M, .]` with its expert's weights."""
