"""The interface of `QTensor`, `StraightThrough`, `FloatKernel` and `LayerOfStack`."""

import abc
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.pytree import TreeLeaf, register
from .._jax.specs import spec_of
from .geometry import Geometry, to_matrix
from .not_an_array import NotAnArray
from .placement import Placement
from .settings import Packing


class PackedInput(NamedTuple):
    """Packed weights to multiply by: a `QTensor`, and the layer if it is a stack."""

    q: Any
    layer: Any


class Kernel(TreeLeaf, NotAnArray, abc.ABC):
    """A kernel of any kind. Its matrix form is `[*batch, K, N]`; see `Geometry`."""

    geometry: Geometry
    # How it is packed, or quantized in training; None for float kernels.
    packing: Packing | None
    is_packed = False  # whether weights are stored as codes
    is_trained = False  # whether the kernel itself is trained, like its adapter
    placement: Placement | None = None  # over Auto mesh axes, if declared
    memory: str = "device"  # of weights between products: "device" or "host"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape, as its module has it."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The logical dtype, to which its weights are rounded."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The name of this kind of kernel in `summary`."""

    @property
    @abc.abstractmethod
    def spec(self) -> tuple:
        """The mesh axes that split each axis of the kernel (Explicit axes)."""

    @abc.abstractmethod
    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The weights in the kernel's shape, rounded to `self.dtype` first."""

    @abc.abstractmethod
    def product_input(self, dtype: Any) -> PackedInput | Float[Array, "*batch k n"]:
        """Returns a product's operand: packed weights, or a matrix `[*batch, K, N]`.

        Args:
            dtype: Dtype of the product.
        """

    @property
    def value(self) -> Any:
        """The array of float weights, or the packed kernel itself."""
        return self

    @property
    def is_stack(self) -> bool:
        """Whether it has more axes than its geometry: those of a scan or a vmap."""
        return self.ndim > len(self.geometry.kinds)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix form, `(*batch, K, N)`."""
        return self.geometry.matrix_shape(self.shape)

    def take(self) -> "Kernel":
        """Returns the kernel, cut out of its stack if it is a layer of one."""
        return self

    def dequantize_matrix(self, dtype: Any = None) -> Float[Array, "*batch k n"]:
        """Returns the float weights in matrix form, `[*batch, K, N]`.

        Args:
            dtype: Dtype of the result; by default the kernel's own. Weights are rounded
                to the kernel's own dtype first.
        """
        return to_matrix(self.geometry, self.dequantize(dtype))

    def to_device(self) -> "Kernel":
        """Returns the kernel with its weights on the device."""
        return self

    @property
    def trained_as(self) -> str:
        """The label of its arrays in `lora_labels`."""
        return "kernel" if self.is_trained else "frozen"

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class ArrayKernel(Kernel):
    """A kernel that is kept as a float array, `value`, in its own shape."""

    @property
    @abc.abstractmethod
    def value(self) -> Any:
        """The float array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's own shape."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        """The kernel's dtype."""
        return jnp.dtype(self.value.dtype)

    @property
    def spec(self) -> tuple:
        """The mesh axes that split each axis of the kernel, with Explicit axes."""
        return spec_of(self.value)

    def product_input(self, dtype: Any) -> Float[Array, "*batch k n"]:  # noqa: D102
        return self.dequantize_matrix(dtype)


@dataclass(frozen=True, eq=False)
class FloatKernel(ArrayKernel):
    """A float array as a kernel."""

    array: Any
    geometry: Geometry
    packing = None

    @property
    def value(self) -> Any:
        """The array."""
        return self.array

    @property
    def label(self) -> str:
        """The name of the dtype."""
        return self.dtype.name

    def dequantize(self, dtype: Any = None) -> Float[Array, "..."]:
        """The weights, in `dtype` if it is given."""
        return self.array if dtype is None else self.array.astype(dtype)


register(FloatKernel, ("array",), ("geometry",))


def as_kernel(leaf: Any, geometry: Geometry | None = None) -> Kernel:
    """Returns a kernel, or a float array as one; by default its last axes are K, N."""
    if isinstance(leaf, Kernel):
        return leaf
    return FloatKernel(leaf, geometry or Geometry())


def is_kernel(node: Any) -> TypeGuard[Kernel]:
    """Whether a node of a tree is a kernel, as `is_leaf` of `jax.tree.map` asks."""
    return isinstance(node, Kernel)


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of a base tree, a kernel or an array, is packed."""
    return as_kernel(leaf).is_packed
