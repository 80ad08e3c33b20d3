"""The static description of a product, its operands, and the interface of back ends."""

import abc
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array

from .._jax.specs import AnyMesh
from ..quant.formats import FORMATS, Format
from ..quant.kernel import Placement
from ..quant.qtensor import QTensor
from ..quant.views import LayerOfStack

PackedKernel = QTensor | LayerOfStack


class Operands(NamedTuple):
    """The arrays of a product. A dot in a shape is a contracted or a packed axis."""

    # `[*batch, *rows, .]`. A back end gets a single axis of rows, `[*batch, M, .]`.
    x: Array
    codes: Array  # uint8 `[*batch, ., N]`, or `[L, *batch, ., N]` with a layer index
    scales: Array  # float32 `[*batch, blocks, N]` of a single layer
    layer: Array | None = None
    # For a ragged product, int32 `[E + 1]`: x is `[M, .]`, and its rows `offsets[e]` to
    # `offsets[e + 1]` are multiplied by expert e. Rows without an expert give zeros.
    offsets: Array | None = None


@jax.tree_util.register_static
@dataclass(frozen=True)
class ProductSpec:
    """Describes the product of x `[*batch, *rows, K]` with packed weights W.

    It is a pytree without leaves, so transformations accept it as an argument.
    """

    fmt: str  # the name of the weights' format
    block_size: int  # the number of rows of the weights that share a scale
    dtype: np.dtype  # the logical dtype; decoded weights are rounded to it
    k: int  # the number of rows of the weights
    batch: int  # the number of batch axes, not counting experts
    result_dtype: np.dtype
    # Whether x, which is then the gradient of y = x W, is multiplied by W^T.
    transpose: bool = False
    backend: tuple[str, ...] | None = None  # None selects by platform
    precision: PrecisionLike = None
    placement: Placement | None = None  # of the weights, if declared
    # The mesh over which arrays are split, from their types (Explicit axes) or from the
    # placement (Auto axes); None on a single device, or if XLA splits the product.
    mesh: AnyMesh | None = None
    is_local: bool = False  # whether the arrays are known to be on one device
    is_ragged: bool = False  # whether rows are multiplied by experts `[E, K, N]`

    @property
    def format(self) -> Format:
        """The number format of the weights."""
        return FORMATS[self.fmt]

    @property
    def is_explicit(self) -> bool:
        """Whether the mesh and how it splits the operands are read from their types."""
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types


def product_spec(
    kernel: PackedKernel, result_dtype: DTypeLike, **options: Any
) -> ProductSpec:
    """Returns the spec of products with a packed kernel; `options` are its fields."""
    *batch, k, _ = kernel.matrix_shape
    q = kernel.stack if isinstance(kernel, LayerOfStack) else kernel
    fields: dict[str, Any] = {
        "fmt": q.fmt,
        "block_size": q.block_size,
        "dtype": q.dtype,
        "k": k,
        "batch": len(batch),
        "result_dtype": jnp.dtype(result_dtype),
        "placement": q.placement,
    }
    return ProductSpec(**fields | options)


class Unsupported(NotImplementedError):
    """A back end does not support a product. The message is the reason."""


class Backend(abc.ABC):
    """Computes the product of one device's arrays, with the same result as `Reference`.

    The result has the dtype `spec.result_dtype`.
    """

    is_opaque = False  # whether XLA cannot or must not partition it

    def check(
        self, spec: ProductSpec, shape: tuple[int, ...], dtype: np.dtype, columns: int
    ) -> None:
        """Raises `Unsupported`, with the reason, if a product is not supported.

        `shape` `[*batch, M, .]` and `dtype` are those of x, where M may be symbolic.
        `columns` is N.
        """
        del spec, shape, dtype, columns

    @abc.abstractmethod
    def product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns `x @ W` or `x @ W^T` for x `[*batch, M, .]`."""

    @abc.abstractmethod
    def ragged_product(self, spec: ProductSpec, operands: Operands) -> Array:
        """Returns the product of each row of x `[M, .]` with its expert's weights."""
