"""The interface of adapters.

A kind declares its arrays and the role of each of their axes; placement, stacking and
slicing follow from the roles. It implements `product` and `merged`.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array, Float

from .._jax.modes import axes_of_type, call_in_auto_mode, explicit_mesh
from .._jax.pytree import TreeLeaf, register
from .._jax.specs import Axes, axes_of, fitting, fitting_spec, make_spec, unused
from ..matmul.sharded import declared_mesh
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, Placement, as_kernel

# Returns `x W`, for x `[*batch, ..., K]` and a kernel, in the dtype of x.
Multiply = Callable[[Array, Kernel], Array]

A = TypeVar("A", bound="Adapter")

# Every kind of adapter, by the name that files have for it, and its sliced form.
KINDS: dict[str, type["Adapter"]] = {}
_SLICED: dict[type["Adapter"], Any] = {}
SETTINGS = ("scaling", "dropout", "geometry")


class Adapter(TreeLeaf, abc.ABC):
    """An adapter of one kernel, whose matrix form is `[*batch, K, N]`.

    Attributes:
        roles: The role of each axis of its arrays, by name: k (of size K), n (of size
            N), r (the rank) or e (the places of a bank). The batch axes of the kernel
            come in front of those.
        label: Its name in `summary`.
        settings: The names of its static fields.
        trained_as: The label of its arrays in `lora_labels`.
        scaling: Multiplier of the low-rank product. A stack may have a tuple of them,
            one for each matrix.
        dropout: Rate of dropout on the adapter's input.
        geometry: How the kernel's axes map to its matrix form.
    """

    roles: ClassVar[Mapping[str, str]]
    label: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = SETTINGS
    trained_as: ClassVar[str] = "lora"
    # Its arrays that are not trained: none, but for adapters of scans and of banks.
    inputs: ClassVar[tuple[str, ...]] = ()
    # Whether it is one for all along the last batch axis, of which it has one.
    is_shared: ClassVar[bool] = False
    scaling: Any
    dropout: float
    geometry: Geometry

    @abc.abstractmethod
    def product(
        self, x: Array, kernel: Kernel, multiply: Multiply, key: Any, precision: Any
    ) -> Array:
        """Returns the adapted kernel's product, `[*batch, ..., N]` in the dtype of `x`.

        Args:
            x: `[*batch, ..., K]`.
            kernel: The frozen kernel.
            multiply: Returns `x W` for an input and a kernel.
            key: PRNG key of the dropout; None for no dropout.
            precision: As in `jax.lax.dot_general`.
        """

    @abc.abstractmethod
    def merged(self, kernel: Kernel) -> Float[Array, "..."]:
        """Returns the weights of `product` in the kernel's shape and dtype.

        Args:
            kernel: The frozen kernel.
        """

    def ragged_product(
        self,
        x: Array,
        kernel: Kernel,
        multiply: Multiply,
        offsets: Array,
        key: Any,
        precision: Any,
    ) -> Array:
        """Returns the product of rows `[M, K]`, sorted by expert, with their experts.

        Args:
            x: `[M, K]`.
            kernel: The frozen experts, `[E, K, N]`.
            multiply: As in `product`, of rows with their experts.
            offsets: Where the rows of each expert begin and end, int32 `[E + 1]`.
            key: As in `product`.
            precision: As in `product`.
        """
        raise NotImplementedError(
            "adapters of experts must be LoRA in a ragged product, and not chosen from "
            f"a bank. Got {type(self).__name__}."
        )

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:
        """Returns rows of the adapted table: `jnp.take` of `merged`.

        Args:
            ids: int32, from 0 to V - 1. V gives NaN.
            kernel: The frozen table, `[V, D]`.
        """
        return jnp.take(self.merged(kernel), ids, axis=0)

    def unshared(self, kernel: Any) -> "Adapter":
        """Returns it with an adapter for each matrix of its kernel.

        Args:
            kernel: The kernel or array, or its shape.
        """
        return self

    @property
    def arrays(self) -> dict[str, Any]:
        """Its arrays by name: what is trained."""
        return {name: getattr(self, name) for name in self.roles}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the kernel's batch axes."""
        name, roles = next(iter(self.roles.items()))
        shape = getattr(self, name).shape
        return tuple(shape[: len(shape) - len(roles)])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape `[*batch, K, N]` of its kernel's matrix form."""
        return (*self.batch_shape, self._size("k"), self._size("n"))

    @property
    def rank(self) -> int:
        """The rank r of the low-rank product; 1 if there is none."""
        return self._size("r")

    def _size(self, role: str) -> int:
        for name, roles in self.roles.items():
            if role in roles:
                return getattr(self, name).shape[roles.index(role) - len(roles)]
        return 1

    @property
    def places(self) -> int | None:
        """The places of the bank that it is chosen from; None for one of no bank."""
        name, roles = next(iter(self.roles.items()))
        return getattr(self, name).shape[-len(roles)] if "e" in roles else None

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(x.shape) for x in self.arrays.values())

    def stacked(self) -> Self:
        """Returns the adapter with a bool for each array: whether it is a stack."""
        is_stack = lambda roles: lambda x: bool(roles) and jnp.ndim(x) > len(roles)
        return replace_arrays(
            self, lambda name, x: jax.tree.map(is_stack(self.roles[name]), x)
        )


def replace_arrays(adapter: A, fn: Callable[[str, Any], Any], **settings: Any) -> A:
    """Returns an adapter with `fn(name, array)` for each array, and other settings."""
    changes = {name: fn(name, x) for name, x in adapter.arrays.items()}
    return dataclasses.replace(adapter, **changes, **settings)  # pyright: ignore


def used_ranks(adapter: Adapter) -> np.ndarray:
    """Returns the rank of each matrix, `[*batch]`, without zeros at its end."""
    batch, used = len(adapter.batch_shape), np.zeros(adapter.rank, bool)
    for name, x in adapter.arrays.items():
        if "r" in (roles := adapter.roles[name]):
            others = tuple(batch + i for i, role in enumerate(roles) if role != "r")
            used = used | np.asarray(jnp.any(x != 0, others))
    return np.max(used * np.arange(1, adapter.rank + 1), axis=-1)


def matrix_at(lora: A, index: tuple[int, ...]) -> A:
    """Returns the adapter of one matrix of a stack, without batch axes."""
    settings = {"scaling": scaling_at(lora, index), "geometry": Geometry()}
    return replace_arrays(lora, lambda _, x: x[index], **settings)


def scaling_at(lora: Adapter, index: tuple[int, ...]) -> float:
    """Returns the scaling of one matrix of a stack, by the index of its batch axes."""
    if not isinstance(lora.scaling, tuple):
        return lora.scaling
    return lora.scaling[np.ravel_multi_index(index, lora.batch_shape)]


def why_not(lora: Adapter, leaf: Any) -> str | None:
    """Returns why it cannot be the adapter of a kernel or array, or None if it can.

    Placeholders without a shape pass. The reason is a sentence to put into an error.
    """
    leaves = (leaf, *lora.arrays.values())
    if not all(isinstance(getattr(x, "shape", None), tuple) for x in leaves):
        return None
    shape = tuple(leaf.shape)
    own = lora.geometry.roles(len(shape))
    kernel = as_kernel(leaf, lora.geometry).geometry.roles(len(shape))
    if own != kernel and lora.geometry.kinds:
        return (
            f"its kernel has axes {kernel!r} (b batch, k contracted, n output); it was "
            f"made for {own!r}."
        )
    *batch, k, n = lora.geometry.matrix_shape(shape)
    if lora.is_shared and batch:
        batch[-1] = 1
    indices = getattr(lora, "indices", ())
    if max(indices, default=0) >= max(k, 1):
        return f"its table has {k} rows. Got one for rows {indices}."
    sizes = {"k": k, "n": n, "e": lora.places}
    shapes = lambda r: [
        [*batch, *map({**sizes, "r": r}.get, roles)] for roles in lora.roles.values()
    ]
    got = [[*x.shape] for x in lora.arrays.values()]
    if got != shapes(lora.rank):
        wanted = zip(lora.roles, shapes("r"), strict=True)
        listed = " and ".join(f"{name.upper()} {shape}" for name, shape in wanted)
        got = " and ".join(map(str, got))
        return f"{listed.replace(' ', ' must be ', 1)}. Got {got}."
    if isinstance(lora.scaling, tuple) and len(lora.scaling) != math.prod(batch):
        return (
            "it has a scaling for each matrix of a stack: apply the whole stack, or "
            f"scan it in a wrapped model. Got batch axes {batch} for "
            f"{len(lora.scaling)} scalings."
        )
    return None


def check_adapter(lora: Any, leaf: Any, name: str) -> None:
    """Raises TypeError for other than an adapter or None, ValueError if it has no fit.

    `name` says what the leaf is.
    """
    if lora is None:
        return
    if not isinstance(lora, Adapter):
        raise TypeError(
            "`lora` must be an adapter, such as a LoRA, or None. Got "
            f"{type(lora).__name__}."
        )
    if (reason := why_not(lora, leaf)) is not None:
        raise ValueError(f"`lora` must be the adapter of the {name}: {reason}")


def sliced(lora: A, scaling: Any = None) -> A:
    """Returns an adapter whose several scalings are an array, which scans slice.

    An array `[*batch]`, a leaf like the others; `scaling` if a scan has sliced it. An
    adapter with one scaling stays as it is.
    """
    if not isinstance(lora.scaling, tuple):
        return lora
    if scaling is None:
        scaling = jnp.asarray(lora.scaling, jnp.float32).reshape(lora.batch_shape)
    settings = {
        name: getattr(lora, name) for name in lora.settings if name != "scaling"
    }
    return sliced_kind(type(lora))(**lora.arrays, scaling=scaling, **settings)


def sliced_kind(kind: type[Adapter]) -> Any:
    """Returns the class of a kind's adapters whose scaling is an array."""
    return _SLICED[kind]


def dropout_keys(lora: Adapter, key: Array) -> Array:
    """Returns keys `[*batch]` from one, for the dropout of each matrix of a stack."""
    return jax.random.split(key, lora.batch_shape) if lora.batch_shape else key


def stored_axes(
    lora: Adapter, kernel: Sequence[Axes], sizes: Mapping[str, int]
) -> dict[str, tuple[Axes, ...]]:
    """Returns the mesh axes of each axis of the stored arrays, from the kernel's.

    K and N are split over all mesh axes of the kernel, and so is optimizer state.
    """
    spec = lora.geometry.matrix_spec(kernel, len(kernel))
    *batch, k, n = (axes_of(entry) for entry in spec)
    return _fitting_axes(lora, batch, {"k": k + n, "n": n + k}, sizes)


def constrained(lora: A, placement: Placement | None) -> A:
    """Returns the adapter, split as the product of its kernel needs it.

    It is stored in more parts. Left alone, XLA would gather activations, which are
    larger. `placement` is that of the kernel, over Auto mesh axes.
    """
    mesh = declared_mesh(placement)
    if placement is None or mesh is None or explicit_mesh(lora) is not None:
        return lora
    auto = axes_of_type(mesh, AxisType.Auto)
    used = {axis for axes in placement.rows for axis in axes}
    *batch, k, n = (
        tuple(name for name in axes if name in auto)
        for axes in placement.matrix_axes(len(lora.batch_shape) + 2)
    )
    roles = {"k": unused(k, used), "n": unused(n, used)}
    axes = _fitting_axes(lora, batch, roles, {name: mesh.shape[name] for name in auto})
    at = lambda name: NamedSharding(mesh, make_spec(*axes[name]))
    constrain = lambda name, x: lax.with_sharding_constraint(x, at(name))
    return replace_arrays(lora, constrain)


def _fitting_axes(
    lora: Adapter,
    batch: list[Axes],
    roles: Mapping[str, Axes],
    sizes: Mapping[str, int],
) -> dict[str, tuple[Axes, ...]]:
    """Returns as many of the mesh axes of batch axes and of roles as divide."""
    found = {}
    for name, x in lora.arrays.items():
        wanted = [*batch, *(roles.get(role, ()) for role in lora.roles[name])]
        pairs = zip(wanted, x.shape, strict=True)
        found[name] = tuple(fitting(axes, sizes, size) for axes, size in pairs)
    return found


def register_adapter(cls: type[Adapter]) -> None:
    """Registers a frozen dataclass of arrays and settings, and its sliced form."""
    register(cls, (*cls.roles,), cls.settings, f"qlora_jax.{cls.__name__}")
    sliced: Any = type(f"Sliced{cls.__name__}", (cls,), {"inputs": ("scaling",)})
    static = tuple(name for name in cls.settings if name != "scaling")
    _SLICED[cls] = register(sliced, (*cls.roles, "scaling"), static)
    KINDS[cls.__name__] = cls


@dataclass(frozen=True, eq=False)
class AdaptedKernel(TreeLeaf):
    """A kernel with its adapter: one leaf of a combined tree, which `combine` makes.

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

    base: Any
    lora: Adapter
    dropout_key: Any = None


register(AdaptedKernel, ("base", "lora", "dropout_key"), (), "qlora_jax.AdaptedKernel")


def parts_of(node: Any) -> tuple[Any, Adapter | None, Any]:
    """Returns a leaf's kernel, its adapter or None, and its dropout key or None."""
    if isinstance(node, AdaptedKernel):
        return node.base, node.lora, node.dropout_key
    return node, None, None


def on_matrix(
    kernel: Kernel, change: Callable[..., Array], *arrays: Array
) -> Float[Array, "..."]:
    """Returns changed weights in the kernel's own shape and dtype.

    `change` maps the weights in float32 `[*batch, K, N]`, and the arrays, to others.
    """

    def run(kernel: Kernel, arrays: tuple[Array, ...]) -> Array:
        w = change(kernel.dequantize_matrix(jnp.float32), *arrays)
        return kernel.geometry.from_matrix(w.astype(kernel.dtype))

    spec = lambda mesh: fitting_spec(mesh, kernel.spec, kernel.shape)
    return call_in_auto_mode(run, spec, kernel, arrays)
