"""The interface of adapters.

A kind of adapter declares its arrays and the role of each of their axes. Placement,
stacking and slicing follow from the roles; a kind implements `change`, or `product`,
and `merged`.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from .._jax import specs
from .._jax.modes import (
    auto_only,
    call_in_auto_mode,
    explicit_mesh,
    split_as,
    split_by,
)
from .._jax.pytree import TreeLeaf, register
from .._jax.specs import Axes, SpecEntry
from ..product.floats import float_product, ragged_float_product
from ..product.matmul import check_shape, multiply
from ..product.spec import PackedKernel
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel, declared_mesh


class ProductCall(NamedTuple):
    """The arguments of a product besides its input, kernel and adapter."""

    dropout_key: Array | None = None  # None for no dropout
    backend: tuple[str, ...] | None = None  # of packed kernels
    precision: lax.PrecisionLike = None
    offsets: Array | None = None  # bounds of each expert's rows, int32 `[E + 1]`
    result_dtype: DTypeLike | None = None  # None for the dtype of x


def frozen_product(
    x: Float[Array, "..."], kernel: Kernel, call: ProductCall
) -> Float[Array, "..."]:
    """Returns the product of x `[*batch, ..., K]` with a kernel, without an adapter."""
    _, backend, precision, offsets, result_dtype = call
    if isinstance(kernel, PackedKernel):
        return multiply(
            x,
            kernel,
            offsets,
            backend=backend,
            precision=precision,
            result_dtype=result_dtype,
        )
    w, dtype = kernel.dequantize_matrix(x.dtype), result_dtype or x.dtype
    if offsets is not None:
        return ragged_float_product(x, w, offsets, precision, dtype)
    check_shape(x.shape, [*w.shape[:-2]], w.shape[-2])
    return float_product(x, w, precision, dtype, weights_move=False)


T = TypeVar("T", bound="Adapter")

# Every kind of adapter, by its name in files.
KINDS: dict[str, type["Adapter"]] = {}


class Adapter(TreeLeaf, abc.ABC):
    """An adapter of one kernel, whose matrix form is `[*batch, K, N]`.

    Most kinds are subclasses of `LowRank` or `Replacement`. Code that handles every
    kind reads the attributes below instead of testing for classes.
    """

    # By the name of each array, the roles of its axes that follow the kernel's batch
    # axes: k (of size K), n (of size N), r (the rank) or e (the places of a bank).
    roles: Mapping[str, str]
    label: str  # the name of this kind of adapter in `summary`
    settings: tuple[str, ...] = ()  # the names of its static fields
    trained_as: ClassVar[str] = "lora"  # the label of its arrays in `lora_labels`
    # Whether its change of the kernel is `scaling * A B`.
    is_linear: ClassVar[bool] = False
    can_be_in_bank: ClassVar[bool] = False
    can_be_ragged: ClassVar[bool] = False  # whether `product` supports `call.offsets`
    # The names of leaves that are not trained, such as the ids of a `Selected`.
    untrained_leaves: tuple[str, ...] = ()
    dropout: float  # the rate of dropout on its input
    geometry: Geometry  # how the kernel's axes map to `[*batch, K, N]`

    def change(
        self, x: Array, kernel: Kernel, call: ProductCall
    ) -> Float[Array, "..."]:
        """Returns what the adapter adds to the product of x with the frozen kernel.

        Args:
            x: The input, `[*batch, ..., K]`; with `call.offsets`, rows `[M, K]`, sorted
                by expert.
            kernel: The frozen kernel.
            call: The settings of the call, such as the dropout key.
        """
        raise NotImplementedError(f"{type(self).__name__} has a `product` of its own.")

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:
        """Returns the adapted product of x, in the dtype of x.

        A kind that does not only add a `change` overrides this.

        Args:
            x: As in `change`.
            kernel: As in `change`.
            call: As in `change`.
        """
        y = frozen_product(x, kernel, call)
        change = self.change(x, kernel, call)
        return y + split_as(change.astype(y.dtype), y)

    @abc.abstractmethod
    def merged(self, kernel: Kernel) -> Float[Array, "..."]:
        """Returns the weights that `product` applies, in the kernel's shape and dtype.

        Args:
            kernel: The frozen kernel.
        """

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:
        """Returns rows of the adapted table `[V, D]`. An id of V gives a row of NaN.

        Args:
            ids: int32 ids of rows, from 0 to V.
            kernel: The frozen table, `[V, D]`.
        """
        raise ValueError(
            "`lora` of a table must be a Trained or a TrainedRows, as `trainable` and "
            f"`trainable_rows` make it. Got {type(self).__name__}."
        )

    def at(self, index: tuple[int, ...]) -> Self:
        """Returns the adapter of one matrix of a stack, for a kernel `[K, N]`.

        Args:
            index: The index of the matrix along the batch axes.
        """
        settings = {"geometry": Geometry()} if "geometry" in self.settings else {}
        return replace_arrays(self, lambda _, x: x[index], **settings)

    def _settings_misfit(self, batch: Sequence[int], k: int) -> str | None:
        """Returns why the settings do not fit a kernel `[*batch, K, N]`, or None."""
        return None

    @property
    def arrays(self) -> dict[str, Array]:
        """The trained arrays by name."""
        return {name: getattr(self, name) for name in self.roles}

    @property
    def replacement(self) -> Array | None:
        """The array that models use instead of the frozen leaf, or None."""
        return None

    @property
    def replaced_rows(self) -> tuple[int, ...]:
        """The indices of the rows of a table that its array replaces."""
        return ()

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the kernel's batch axes."""
        name, roles = next(iter(self.roles.items()))
        shape = self.arrays[name].shape
        return tuple(shape[: len(shape) - len(roles)])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape `[*batch, K, N]` of its kernel's matrix form."""
        return (*self.batch_shape, self._size("k"), self._size("n"))

    @property
    def rank(self) -> int:
        """The rank r of the low-rank product; 1 for an adapter without one."""
        return self._size("r")

    def _size(self, role: str) -> int:
        for name, roles in self.roles.items():
            if role in roles:
                return self.arrays[name].shape[roles.index(role) - len(roles)]
        return 1

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(x.shape) for x in self.arrays.values())

    def _replace(self, arrays: Mapping[str, PyTree], **settings: Any) -> Self:
        return dataclasses.replace(self, **arrays, **settings)  # pyright: ignore


def register_adapter(kind: type[Adapter]) -> None:
    """Registers a kind of adapter: a frozen dataclass of arrays and settings."""
    register(kind, (*kind.roles,), kind.settings, f"qlora_jax.{kind.__name__}")
    KINDS[kind.__name__] = kind


def is_adapter(node: object) -> TypeGuard[Adapter]:
    """Whether a node of a tree is an adapter."""
    return isinstance(node, Adapter)


def replace_arrays(lora: T, fn: Callable[[str, Array], PyTree], **settings: Any) -> T:
    """Returns the adapter with `fn(name, array)` for each array, and new settings."""
    arrays = {name: fn(name, x) for name, x in lora.arrays.items()}
    return lora._replace(arrays, **settings)


def with_dropout(lora: T, dropout: float) -> T:
    """Returns the adapter with another dropout rate."""
    return lora._replace(lora.arrays, dropout=dropout)


def used_ranks(lora: Adapter) -> np.ndarray:
    """Returns the rank of each matrix, `[*batch]`, without counting trailing zeros."""
    batch_ndim, is_used = len(lora.batch_shape), np.zeros(lora.rank, bool)
    for name, x in lora.arrays.items():
        if "r" in (roles := lora.roles[name]):
            axes = (batch_ndim + i for i, role in enumerate(roles) if role != "r")
            is_used = is_used | np.asarray(jnp.any(x != 0, tuple(axes)))
    # `is_used` is [*batch, r]. Find the largest used index, counted from 1.
    return np.max(is_used * np.arange(1, lora.rank + 1), axis=-1)


def dropout_keys(lora: Adapter, key: Array) -> Array:
    """Splits a key into keys `[*batch]` for the dropout of each matrix of a stack."""
    return jax.random.split(key, lora.batch_shape) if lora.batch_shape else key


def check_adapter(lora: object, leaf: PyTree, leaf_name: str) -> None:
    """Raises an error unless `lora` is None or an adapter that fits a leaf."""
    if lora is None:
        return
    if not isinstance(lora, Adapter):
        raise TypeError(
            "`lora` must be an adapter, such as a LoRA, or None. Got "
            f"{type(lora).__name__}."
        )
    if (reason := misfit_reason(lora, leaf)) is not None:
        raise ValueError(f"`lora` must be the adapter of the {leaf_name}: {reason}")


def misfit_reason(lora: Adapter, leaf: PyTree) -> str | None:
    """Returns why an adapter does not fit a kernel or array, or None if it does.

    A placeholder without a shape always fits. The reason is for an error message.
    """
    leaves = (leaf, *lora.arrays.values())
    if not all(isinstance(getattr(x, "shape", None), tuple) for x in leaves):
        return None
    # 1. The kernel must have the axes that the adapter was made for. A `Trained`, whose
    #    geometry has no kinds, fits all axes.
    shape = tuple(leaf.shape)
    adapter_roles = lora.geometry.roles(len(shape))
    kernel_roles = as_kernel(leaf, lora.geometry).geometry.roles(len(shape))
    if adapter_roles != kernel_roles and lora.geometry.kinds:
        return (
            f"its kernel has axes {kernel_roles!r} (b batch, k contracted, n output); "
            f"it was made for {adapter_roles!r}."
        )
    *batch, k, n = lora.geometry.matrix_shape(shape)

    # 2. Every array must have the shape that follows from the roles of its axes. In the
    #    error, "r" stands for the rank, because any rank fits.
    def expected_shapes(rank: int | str) -> list[list]:
        sizes = {"k": k, "n": n, "e": lora._size("e"), "r": rank}
        return [[*batch, *map(sizes.get, roles)] for roles in lora.roles.values()]

    shapes = [[*x.shape] for x in lora.arrays.values()]
    if shapes != expected_shapes(lora.rank):
        expected = zip(lora.roles, expected_shapes("r"), strict=True)
        listed = " and ".join(f"{name.upper()} {shape}" for name, shape in expected)
        received = " and ".join(map(str, shapes))
        # Only the first array gets the verb: "A must be [64, 'r'] and B ['r', 8]".
        return f"{listed.replace(' ', ' must be ', 1)}. Got {received}."
    # 3. Its settings must fit the kernel.
    return lora._settings_misfit(batch, k)


def stored_axes(
    lora: Adapter, kernel_spec: Sequence[SpecEntry], sizes: Mapping[str, int]
) -> dict[str, tuple[Axes, ...]]:
    """Returns the mesh axes of each axis of the stored arrays, from the kernel's spec.

    A has no axis N, so its K is split over the mesh axes of the kernel's N, too. The
    same holds for N of B, and for the optimizer state.
    """
    spec = lora.geometry.matrix_spec(kernel_spec, len(kernel_spec))
    *batch, k, n = (specs.axes_of(entry) for entry in spec)
    return _fitting_axes(lora, batch, {"k": k + n, "n": n + k}, sizes)


def constrained(lora: T, kernel: Kernel, x: Array | None = None) -> T:
    """Returns the adapter, split as its product with x on a mesh needs it.

    Without x, it is split as the sum of the kernel and `A B` needs it.
    """
    # The stored arrays are split over more mesh axes than the kernel. Otherwise, the
    # activations or the weights, which are larger, would be gathered to match them.
    mesh, placement = explicit_mesh(kernel), kernel.placement
    if mesh is not None:
        return _narrowed(lora, kernel, x, mesh)
    mesh = declared_mesh(placement)
    if placement is None or mesh is None or explicit_mesh(lora) is not None:
        return lora
    rows = () if x is None else placement.rows
    row_axes = {axis for axes in rows for axis in axes}
    matrix_axes = placement.matrix_axes(len(lora.batch_shape) + 2)
    *batch, k, n = auto_only(mesh, matrix_axes)
    role_axes = {
        "k": specs.free_prefix(k, row_axes),
        "n": specs.free_prefix(n, row_axes),
    }
    axes = _fitting_axes(lora, batch, role_axes, mesh.shape)

    def constrain(name: str, x: Array) -> Array:
        sharding = NamedSharding(mesh, specs.make_spec(*axes[name]))
        return lax.with_sharding_constraint(x, sharding)

    return replace_arrays(lora, constrain)


def _narrowed(lora: T, kernel: Kernel, x: Array | None, mesh: specs.AnyMesh) -> T:
    """Gathers arrays over the Explicit mesh axes that split neither W nor x W."""
    *_, k, n = kernel.geometry.matrix_spec(kernel.spec, kernel.ndim)
    role_axes = {"k": specs.axes_of(k), "n": specs.axes_of(n)}
    if x is not None:
        del role_axes["k"]  # the product itself splits A along K as x is split
        row_axes = {axis for axes in specs.mesh_axes(x)[:-1] for axis in axes}
        role_axes["n"] = specs.free_prefix(role_axes["n"], row_axes)

    def narrow(name: str, array: Array) -> Array:
        axes = specs.mesh_axes(array)
        for i, role in enumerate(reversed(lora.roles[name]), 1):
            if role in role_axes:
                dropped = {*axes[-i]}.difference(role_axes[role])
                axes[-i] = specs.free_prefix(axes[-i], dropped)
        is_same = axes == specs.mesh_axes(array)
        return array if is_same else split_by(array, mesh, specs.make_spec(*axes))

    return replace_arrays(lora, narrow)


def _fitting_axes(
    lora: Adapter,
    batch: list[Axes],
    role_axes: Mapping[str, Axes],
    mesh_sizes: Mapping[str, int],
) -> dict[str, tuple[Axes, ...]]:
    """Returns the mesh axes of each array, without those that do not divide it."""
    axes_by_name = {}
    for name, x in lora.arrays.items():
        axes = [*batch, *(role_axes.get(role, ()) for role in lora.roles[name])]
        pairs = zip(axes, x.shape, strict=True)
        axes_by_name[name] = tuple(
            specs.dividing_prefix(a, mesh_sizes, n) for a, n in pairs
        )
    return axes_by_name


@dataclass(frozen=True, eq=False)
class AdaptedKernel(TreeLeaf):
    """A kernel with its adapter: one leaf of the combined tree that `combine` returns.

    Attributes:
        base: The kernel: a QTensor, a StraightThrough or a float array.
        lora: Its adapter.
        dropout_key: PRNG key of the adapter's dropout (one for each matrix of a
            stack), or None, which means no dropout.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> tree = ql.combine(*ql.init(jax.random.key(0), params, ql.QLoRAConfig()))
        >>> type(tree["kernel"]).__name__, tree["bias"].shape
        ('AdaptedKernel', (8,))
    """

    base: PyTree
    lora: Adapter
    dropout_key: Array | None = None


register(AdaptedKernel, ("base", "lora", "dropout_key"), (), "qlora_jax.AdaptedKernel")


def parts_of(node: PyTree) -> tuple[PyTree, Adapter | None, Array | None]:
    """Returns the kernel, adapter and dropout key of a leaf; None for missing parts."""
    if isinstance(node, AdaptedKernel):
        return node.base, node.lora, node.dropout_key
    return node, None, None


def on_matrix(
    kernel: Kernel, change: Callable[..., Array], *arrays: Array
) -> Float[Array, "..."]:
    """Returns `change(w, *arrays)` for the float32 weights in matrix form.

    The result has the kernel's own shape and dtype.
    """

    def change_matrix(kernel: Kernel, arrays: tuple[Array, ...]) -> Array:
        w = change(kernel.dequantize_matrix(jnp.float32), *arrays).astype(kernel.dtype)
        mesh, placement = declared_mesh(kernel.placement), kernel.placement
        if mesh is not None and placement is not None:
            # XLA might split the result like the adapter, and move the codes.
            axes = auto_only(mesh, placement.matrix_axes(w.ndim))
            spec = specs.fitting_spec(mesh, axes, w.shape)
            w = lax.with_sharding_constraint(w, NamedSharding(mesh, spec))
        return kernel.geometry.from_matrix(w)

    # The spec is only read on a mesh: codes in host memory do not have one.
    def spec_on(mesh: specs.AnyMesh) -> specs.PartitionSpec:
        return specs.fitting_spec(mesh, kernel.spec, kernel.shape)

    return call_in_auto_mode(change_matrix, spec_on, kernel, arrays)
