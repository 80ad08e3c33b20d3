"""The interface of all kinds of kernels, their placement, and float kernels.

The kinds are `QTensor`, `StraightThrough`, `FloatKernel` and `LayerOfStack`.
"""

import abc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, get_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._jax.pytree import TreeLeaf, register
from .._jax.specs import AnyMesh, Axes, SpecEntry, spec_of
from .formats import Packing
from .geometry import Geometry, to_matrix

# The attributes of arrays that users may expect of a kernel.
ARRAY_ATTRIBUTES = frozenset(
    "T mT at astype reshape transpose swapaxes flatten ravel squeeze view dot sum prod "
    "mean std var min max argmin argmax all any clip round real imag conj item tolist "
    "copy device devices sharding addressable_shards block_until_ready".split()
)


class NotAnArrayError(TypeError, AttributeError):
    """A kernel was used as an array.

    This is also an AttributeError, so that `hasattr` works.
    """


class NotAnArray:
    """Base of kernels. Using one as an array raises an error with alternatives."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        del args, kwargs
        raise NotAnArrayError(
            f"{type(self).__name__} is not an array. Use ql.matmul(x, q) or ql.einsum "
            "to multiply by it, and ql.dequantize(q) for its float weights."
        )

    # NumPy and `jnp.asarray` call `__array__`. With `__array_ufunc__ = None`, the
    # operators of arrays defer to reflected methods such as `__rmatmul__`. Kernels must
    # stay hashable, so `==` and `!=` compare identities.
    __array__ = _refuse
    __array_ufunc__ = None
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __pos__ = __abs__ = _refuse
    __float__ = __int__ = __complex__ = __getitem__ = __iter__ = __len__ = _refuse

    def __bool__(self) -> bool:
        """True. By default, Python would call `__len__`, which raises."""
        return True

    if not TYPE_CHECKING:  # with `__getattr__`, type checkers allow any attribute

        def __getattr__(self, name: str) -> object:
            """Raises NotAnArrayError for attributes of arrays, else AttributeError."""
            if name in ARRAY_ATTRIBUTES:
                self._refuse()
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}.")


@dataclass(frozen=True)
class Placement:
    """The sharding of a packed kernel over Auto mesh axes, as a static field.

    While a program is traced, the types of arrays do not contain this sharding. An
    outdated placement costs a reshard, but never changes a result.
    """

    sizes: tuple[tuple[str, int], ...]  # names and sizes of the mesh axes
    # The mesh axes of each axis of the matrix form `[*batch, K, N]`, aligned on the
    # right, so that they also fit a slice of a stack.
    kernel: tuple[Axes, ...]
    # The mesh axes of the row axes of the input: first the batch, then the sequence.
    rows: tuple[Axes, ...] = ()

    @property
    def mesh(self) -> AbstractMesh:
        """The mesh, with Auto axes."""
        names, sizes = zip(*self.sizes, strict=True)
        return AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))

    def matrix_axes(self, ndim: int) -> tuple[Axes, ...]:
        """The mesh axes of a matrix form with `ndim` axes."""
        # Axes in front of those of `self.kernel` are not split.
        return (((),) * ndim + self.kernel)[len(self.kernel) :]

    def row_axes(self, count: int) -> tuple[Axes, ...]:
        """The mesh axes of an input's `count` row axes."""
        return (self.rows + ((),) * count)[:count]


def declared_mesh(placement: Placement | None) -> AnyMesh | None:
    """Returns a placement's mesh; None if the context differs or has no Auto axes."""
    if placement is None:
        return None
    mesh, context = placement.mesh, get_abstract_mesh()
    if context.empty:
        return mesh
    # Inside a `shard_map` over some of the mesh axes, the others are still Auto.
    is_same = dict(context.shape) == dict(mesh.shape)
    return context if is_same and AxisType.Auto in context.axis_types else None


class Kernel(TreeLeaf, NotAnArray, abc.ABC):
    """A kernel of any kind. Its matrix form is `[*batch, K, N]`; see `Geometry`."""

    geometry: Geometry
    # How the kernel is packed, or quantized in training; None for float kernels.
    packing: Packing | None
    is_packed = False  # whether weights are stored as codes
    is_trained = False  # whether the kernel itself is trained, like its adapter
    placement: Placement | None = None  # over Auto mesh axes, if declared
    memory: str = "device"  # where weights are between products: "device" or "host"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel in its module."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The logical dtype, to which decoded weights are rounded."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The name of this kind of kernel in `summary`."""

    @property
    @abc.abstractmethod
    def spec(self) -> tuple[SpecEntry, ...]:
        """The Explicit mesh axes that split each axis of the kernel."""

    @abc.abstractmethod
    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
        """The weights in the kernel's shape, rounded to its dtype, then to `dtype`."""

    @property
    def value(self) -> Any:
        """The array of float weights, or the packed kernel itself."""
        return self

    @property
    def is_stack(self) -> bool:
        """Whether a scan or a vmap has added axes in front of those of `geometry`."""
        return self.ndim > len(self.geometry.kinds)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the matrix form, `(*batch, K, N)`."""
        return self.geometry.matrix_shape(self.shape)

    def take(self) -> "Kernel":
        """Returns the kernel itself, or a copy of it if it is a layer of a stack."""
        return self

    def dequantize_matrix(self, dtype: DTypeLike | None = None) -> Array:
        """Returns the weights of `dequantize` in matrix form, `[*batch, K, N]`.

        Args:
            dtype: The dtype of the result; by default the kernel's dtype.
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
    """A kernel that is stored as a float array, `value`, in its own shape."""

    @property
    @abc.abstractmethod
    def value(self) -> Array:
        """The float array."""

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:  # noqa: D102
        return jnp.dtype(self.value.dtype)

    @property
    def spec(self) -> tuple[SpecEntry, ...]:  # noqa: D102
        return spec_of(self.value)


@dataclass(frozen=True, eq=False)
class FloatKernel(ArrayKernel):
    """A float array as a kernel."""

    array: Array
    geometry: Geometry
    packing = None

    @property
    def value(self) -> Array:  # noqa: D102
        return self.array

    @property
    def label(self) -> str:  # noqa: D102
        return self.dtype.name

    def dequantize(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:  # noqa: D102
        return self.array if dtype is None else self.array.astype(dtype)


register(FloatKernel, ("array",), ("geometry",))


def as_kernel(leaf: PyTree, geometry: Geometry | None = None) -> Kernel:
    """Wraps a float array as a kernel; by default its last axes are K, N."""
    if isinstance(leaf, Kernel):
        return leaf
    return FloatKernel(leaf, geometry or Geometry())


def is_kernel(node: object) -> TypeGuard[Kernel]:
    """Whether a node of a tree is a kernel, for `is_leaf` of `jax.tree.map`."""
    return isinstance(node, Kernel)


def is_packed(leaf: PyTree) -> bool:
    """Returns whether a leaf is a packed kernel, for `is_leaf` of `jax.tree.map`.

    Args:
        leaf: A kernel, an array or another node of a tree.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.is_packed(ql.quantize(jnp.ones((64, 8)))), ql.is_packed(jnp.ones(8))
        (True, False)
    """
    return as_kernel(leaf).is_packed
