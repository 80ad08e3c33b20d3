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
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from .._jax.modes import explicit_mesh, in_auto_mode
from .._jax.pytree import TreeLeaf, register
from .._jax.specs import Axes, axes_of, fitting, fitting_spec, make_spec, unused
from ..matmul.sharded import auto_axes, declared_mesh
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel
from ..quant.placement import Placement

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
            N) or r (the rank). The batch axes of the kernel come in front of those.
        label: Its name in `summary`.
        trained_as: The label of its arrays in `lora_labels`.
        scaling: Multiplier of the low-rank product. A stack may have a tuple of them,
            one for each matrix.
        dropout: Rate of dropout on the adapter's input.
        geometry: How the kernel's axes map to its matrix form.
    """

    roles: ClassVar[Mapping[str, str]]
    label: ClassVar[str]
    trained_as: ClassVar[str] = "lora"
    scaling: Any
    dropout: float
    geometry: Geometry

    @abc.abstractmethod
    def product(
        self,
        x: Float[Array, "..."],
        kernel: Kernel,
        multiply: Multiply,
        *,
        dropout_key: Any = None,
        precision: Any = None,
    ) -> Float[Array, "..."]:
        """Returns the product of the adapted kernel, in the dtype of `x`.

        Args:
            x: `[*batch, ..., K]`.
            kernel: The frozen kernel.
            multiply: Returns `x W` for an input and a kernel.
            dropout_key: PRNG key of the dropout; None for no dropout.
            precision: As in `jax.lax.dot_general`.

        Returns:
            `[*batch, ..., N]`.
        """

    @abc.abstractmethod
    def merged(self, kernel: Kernel) -> Float[Array, "..."]:
        """Returns the weights that `product` multiplies by, without dropout.

        Args:
            kernel: The frozen kernel.

        Returns:
            An array of the kernel's own shape and dtype, rounded once.
        """

    def replace(self, **changes: Any) -> Self:
        """Returns the adapter with other arrays or settings.

        Args:
            **changes: These, by name.

        Returns:
            A new adapter of the same kind.
        """
        return dataclasses.replace(self, **changes)  # pyright: ignore

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
        """The rank r of the low-rank product."""
        return self._size("r")

    def _size(self, role: str) -> int:
        name, roles = next((n, r) for n, r in self.roles.items() if role in r)
        return getattr(self, name).shape[roles.index(role) - len(roles)]

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays whose product is as large as the kernel."""
        return tuple(self.arrays[n].shape for n, r in self.roles.items() if "r" in r)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(math.prod(x.shape) for x in self.arrays.values())

    @property
    def nbytes(self) -> int:
        """Bytes that its arrays take."""
        arrays = self.arrays.values()
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    def scaling_at(self, index: tuple[int, ...]) -> float:
        """Returns the scaling of one matrix of a stack.

        Args:
            index: Index of its batch axes.

        Returns:
            The number that its product is multiplied by.

        Example:
            >>> import jax, jax.numpy as jnp, qlora_jax as ql
            >>> params = {"kernel": jnp.ones((3, 64, 8))}
            >>> _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
            >>> lora["kernel"].scaling_at((2,))
            1.0
        """
        if not isinstance(self.scaling, tuple):
            return self.scaling
        place = 0
        for i, size in zip(index, self.batch_shape, strict=True):
            place = place * size + i
        return self.scaling[place]

    def at(self, index: tuple[int, ...]) -> Self:
        """Returns the adapter of one matrix of a stack.

        Args:
            index: Index of its batch axes.

        Returns:
            An adapter without batch axes, of a kernel `[K, N]`.
        """
        one = replace_arrays(self, lambda _, x: x[index])
        return one.replace(scaling=self.scaling_at(index), geometry=Geometry())

    def why_not(self, leaf: Any) -> str | None:
        """Returns why it cannot be the adapter of a kernel, or None if it can.

        Args:
            leaf: A kernel or a float array; placeholders without a shape pass.

        Returns:
            The reason, a sentence to put into an error; None if axes and shapes fit.

        Example:
            >>> import jax, jax.numpy as jnp, qlora_jax as ql
            >>> params = {"kernel": jnp.ones((64, 8))}
            >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
            >>> lora["kernel"].why_not(base["kernel"]) is None
            True
            >>> lora["kernel"].why_not(jnp.ones((32, 8)))
            "A must be [32, 'r'] and B ['r', 8]. Got [64, 4] and [4, 8]."
        """
        leaves = (leaf, *self.arrays.values())
        if not all(isinstance(getattr(x, "shape", None), tuple) for x in leaves):
            return None
        shape = tuple(leaf.shape)
        own = self.geometry.roles(len(shape))
        kernel = as_kernel(leaf, self.geometry).geometry.roles(len(shape))
        if own != kernel:
            return (
                f"its kernel has axes {kernel!r} (b batch, k contracted, n output); it "
                f"was made for {own!r}."
            )
        *batch, k, n = self.geometry.matrix_shape(shape)
        sizes = {"k": k, "n": n, "r": self.rank}
        shapes = lambda s: [[*batch, *map(s.get, r)] for r in self.roles.values()]
        got = [[*x.shape] for x in self.arrays.values()]
        if got == shapes(sizes):
            return self._why_not_scaled(batch)
        wanted = zip(self.roles, shapes(sizes | {"r": "r"}), strict=True)
        listed = " and ".join(f"{name.upper()} {shape}" for name, shape in wanted)
        got = " and ".join(map(str, got))
        return f"{listed.replace(' ', ' must be ', 1)}. Got {got}."

    def _why_not_scaled(self, batch: list[int]) -> str | None:
        if not isinstance(self.scaling, tuple) or len(self.scaling) == math.prod(batch):
            return None
        return (
            "it has a scaling for each matrix of a stack: apply the whole stack, or "
            f"scan it in a wrapped model. Got batch axes {batch} for "
            f"{len(self.scaling)} scalings."
        )

    def sliced(self, scaling: Any = None) -> Self:
        """Returns the adapter with several scalings as an array, which scans slice.

        Args:
            scaling: The scalings `[*batch]`, where a scan has sliced them.

        Returns:
            This adapter, unless it has several scalings; then one whose `scaling` is an
            array `[*batch]`, a leaf like its arrays.
        """
        if not isinstance(self.scaling, tuple):
            return self
        if scaling is None:
            scaling = jnp.asarray(self.scaling, jnp.float32).reshape(self.batch_shape)
        settings = {"dropout": self.dropout, "geometry": self.geometry}
        return _SLICED[type(self)](**self.arrays, scaling=scaling, **settings)

    def stacked(self) -> Self:
        """Whether the first axis of each array is an axis of matrices.

        Returns:
            The adapter with a bool in the place of each array.
        """
        is_stack = lambda roles: lambda x: jnp.ndim(x) > len(roles)
        return replace_arrays(
            self, lambda name, x: jax.tree.map(is_stack(self.roles[name]), x)
        )

    def dropout_keys(self, key: Array) -> Array:
        """Returns a key for the dropout of each matrix of a stack.

        Args:
            key: One key.

        Returns:
            Keys `[*batch]`.
        """
        batch = self.batch_shape
        return jax.random.split(key, batch) if batch else key

    def stored_axes(
        self, kernel: Sequence[Axes], sizes: Mapping[str, int]
    ) -> dict[str, tuple[Axes, ...]]:
        """Returns the mesh axes that split each axis of the stored arrays.

        K and N are split over all mesh axes of the kernel, and so is optimizer state.

        Args:
            kernel: The mesh axes of each axis of the kernel.
            sizes: Sizes of the mesh axes.

        Returns:
            The mesh axes of each axis, by name of the array.
        """
        spec = self.geometry.matrix_spec(kernel, len(kernel))
        *batch, k, n = (axes_of(entry) for entry in spec)
        return self._axes(batch, {"k": k + n, "n": n + k, "r": ()}, sizes)

    def _axes(
        self, batch: list[Axes], roles: Mapping[str, Axes], sizes: Mapping[str, int]
    ) -> dict[str, tuple[Axes, ...]]:
        """Returns as many of the mesh axes of batch axes and of roles as divide."""
        found = {}
        for name, x in self.arrays.items():
            wanted = [*batch, *map(roles.__getitem__, self.roles[name])]
            pairs = zip(wanted, x.shape, strict=True)
            found[name] = tuple(fitting(axes, sizes, size) for axes, size in pairs)
        return found

    def constrained(self, placement: Placement | None) -> Self:
        """Returns the adapter, split as the product of its kernel needs it.

        It is stored in more parts. Left alone, XLA would gather activations, which are
        larger.

        Args:
            placement: That of the kernel.

        Returns:
            The adapter, its arrays constrained where mesh axes are Auto.
        """
        mesh = declared_mesh(placement)
        if mesh is None or explicit_mesh(self) is not None:
            return self
        assert placement is not None
        auto, used = auto_axes(mesh), {axis for axes in placement.rows for axis in axes}
        *batch, k, n = (
            tuple(name for name in axes if name in auto)
            for axes in placement.matrix_axes(len(self.batch_shape) + 2)
        )
        roles = {"k": unused(k, used), "n": unused(n, used), "r": ()}
        axes = self._axes(batch, roles, {name: mesh.shape[name] for name in auto})
        at = lambda name: NamedSharding(mesh, make_spec(*axes[name]))
        constrain = lambda name, x: lax.with_sharding_constraint(x, at(name))
        return replace_arrays(self, constrain)


def replace_arrays(adapter: A, fn: Callable[[str, Any], Any]) -> A:
    """Returns an adapter with `fn(name, array)` in the place of each array."""
    return adapter.replace(**{name: fn(name, x) for name, x in adapter.arrays.items()})


def register_adapter(cls: type[Adapter]) -> None:
    """Registers a frozen dataclass of arrays and settings, and its sliced form."""
    register(cls, (*cls.roles,), SETTINGS, f"qlora_jax.{cls.__name__}")
    sliced: Any = type(f"Sliced{cls.__name__}", (cls,), {})
    _SLICED[cls] = register(sliced, (*cls.roles, "scaling"), ("dropout", "geometry"))
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

    mesh = explicit_mesh(kernel, arrays)
    if mesh is not None:
        run = in_auto_mode(run, mesh, fitting_spec(mesh, kernel.spec, kernel.shape))
    return run(kernel, arrays)
