"""Variables of a wrapped module: the packed kernel and its adapter."""

from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from .._jax.pytree import Note
from ..adapters.base import Adapter, with_dropout
from ..quant.formats import Packing
from ..quant.pack import StraightThrough
from ..quant.qtensor import QTensor
from ..trees.paths import KeyPath, Leaf

# The owner of a variable: a module, or a dict of linen variables in `nnx.bridge.ToNNX`.
Holder = nnx.Module | dict[str, Any]
P = TypeVar("P", bound="Packed")


class Packed(nnx.Variable[QTensor]):
    """The frozen, packed kernel of a wrapped module; its value is a `QTensor`.

    It is not an `nnx.Param`: optimizers and gradients of parameters skip it.
    `get_value()` returns the QTensor; indexing and conversion to an array raise a
    TypeError. Name it in the filters of a scanned stack:
    `nnx.StateAxes({(nnx.Param, ql.nnx.Packed): 0, ...: None})`.

    Example:
        >>> from flax import nnx
        >>> import qlora_jax as ql
        >>> layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
        >>> layer = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(1))
        >>> layer.kernel.get_value()
        QTensor(nf4, float32[64,8], block_size=64, double_quant, 4.25 bits)
        >>> isinstance(layer.kernel, nnx.Param)
        False
    """

    def __getitem__(self, key: object) -> NoReturn:
        raise TypeError(
            f"{self.get_metadata('path', 'kernel')}: a packed kernel cannot be read as "
            "an array outside the methods of its module. Use "
            "`ql.dequantize(kernel.get_value())`, or exclude it."
        )

    def __jax_array__(self) -> Array:
        return self[...]

    @property
    def sharding(self) -> PyTree:
        """The shardings of the value's arrays, in a tree like the value."""
        # On a mesh, `nnx.eval_shape` makes values without a sharding float arrays.
        return jax.tree.map(lambda x: getattr(x, "sharding", None), self.get_value())


# The next two are subclasses of `Packed`, so that filters that name it select them too.
class UntrainedLeaves(Packed):
    """An adapter's untrained leaves by name, such as ids. Scans slice them."""


class Frozen(Packed):
    """The original array of a leaf that is trained in full and has been replaced."""

    __getitem__ = nnx.Variable.__getitem__


class AdapterModule(nnx.Module):
    """The adapter of one kernel: each array is an `nnx.LoRAParam`, by name."""

    # A `Trained` adapter also puts its `nnx.LoRAParam` in place of the leaf, where the
    # module reads it, and keeps the leaf in `frozen`.

    def __init__(
        self,
        adapter: Adapter,
        rngs: nnx.RngStream | None,
        trained_packing: Packing | None = None,
        path: str = "",
        frozen: Frozen | None = None,
    ):
        self.frozen = nnx.data(frozen)
        self.names = (*adapter.roles,)  # of the arrays
        self.rate = adapter.dropout
        self.set(adapter)
        self.trained_packing = trained_packing  # packing of a trained kernel, or None
        self.path = Note(path)  # for errors; all notes are equal in graph definitions
        self.deterministic = False  # set by `model.train()` and `model.eval()`
        self.enabled = True  # set by `disable_adapters`
        self.rngs = rngs if adapter.dropout else nnx.data(None)

    @property
    def variables(self) -> dict[str, nnx.Variable]:
        """The variables of the arrays, by name."""
        return {name: getattr(self, name) for name in self.names}

    def set(self, adapter: Adapter) -> None:
        """Takes over an adapter's arrays and settings, except its dropout."""
        for name in {*self.names} - {*adapter.roles}:
            delattr(self, name)
        self.names = (*adapter.roles,)
        for name, x in adapter.arrays.items():
            # The module reads a `Trained` array in the dtype of the leaf.
            if self.frozen is not None:
                x = x.astype(self.frozen.get_value().dtype)
            # Optimizers refer to variables, so an old one gets the new value.
            if hasattr(self, name):
                getattr(self, name).set_value(x)
            else:
                setattr(self, name, nnx.LoRAParam(x))
        self.geometry = adapter.geometry
        # A tree structure has the kind of an adapter and its static settings.
        self.structure = jax.tree.structure(adapter)
        self.untrained_names = adapter.untrained_leaves
        leaves = jax.tree.leaves(adapter)[len(self.names) :]
        untrained: Any = dict(zip(self.untrained_names, leaves, strict=True))
        # The attribute is a key of saved states, so it keeps its name.
        self.inputs: Any = UntrainedLeaves(untrained) if untrained else nnx.data(None)

    @property
    def adapter(self) -> Adapter:
        """The adapter of the entire stack; inside a scan, that of a layer."""
        arrays = [variable[...] for variable in self.variables.values()]
        untrained = {} if self.inputs is None else self.inputs.get_value()
        leaves = [*arrays, *(untrained[name] for name in self.untrained_names)]
        adapter: Adapter = self.structure.unflatten(leaves)
        has_dropout = "dropout" in adapter.settings
        return with_dropout(adapter, self.rate) if has_dropout else adapter

    @property
    def sliced(self) -> Adapter | None:
        """The adapter for a call, or None if it is disabled."""
        return self.adapter if self.enabled else None

    def dropout_key(self) -> jax.Array | None:
        """Returns a new key for the dropout of a call, or None without dropout."""
        if self.rngs is None or self.deterministic or not self.enabled:
            return None
        return self.rngs()


def check_module(model: object) -> None:
    """Raises TypeError unless `model` is an nnx module."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be an nnx.Module. Got {type(model).__name__}. For a linen "
            "module, use ql.linen."
        )


def attributes(holder: Holder) -> dict[str, Any]:
    """Returns the attributes of a module or the entries of a dict, by name."""
    return holder if isinstance(holder, dict) else vars(holder)


def set_attribute(holder: Holder, name: str, value: object) -> None:
    """Sets an attribute of a module or an entry of a dict."""
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def del_attribute(holder: Holder, name: str) -> None:
    """Deletes an attribute of a module or an entry of a dict."""
    if isinstance(holder, dict):
        del holder[name]
    else:
        delattr(holder, name)


def runs_linen(module: nnx.Module) -> bool:
    """Whether a module is an `nnx.bridge.ToNNX`, or a copy of it, as in MaxText."""
    return "to_nnx__module" in vars(module)


def linen_attributes(module: nnx.Module) -> dict[str, Any]:
    """Returns the linen variables among a module's attributes."""
    # Attributes of `ToNNX` itself and of `nnx.Pytree`.
    internal = ("to_nnx__", "_pytree__", "_object__")
    public = {n: v for n, v in vars(module).items() if not n.startswith(internal)}
    return {n: v for n, v in public.items() if not isinstance(v, AdapterModule)}


def adapter_of(holder: Holder, name: str) -> AdapterModule:
    """Returns the AdapterModule of the kernel `name`; its `adapter` is an Adapter."""
    return attributes(holder)[f"{name}_lora"]


def adapted_names(holder: Holder) -> list[str]:
    """Returns the names of the holder's adapted kernels."""
    items = attributes(holder).items()
    adapters = [name for name, x in items if isinstance(x, AdapterModule)]
    return [name.removesuffix("_lora") for name in adapters]


def adapted_kernels(model: nnx.Module) -> Iterator[tuple[KeyPath, Holder, str]]:
    """Yields the path, the holder and the name of each adapted kernel."""
    for path, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.Module | dict):
            for name in adapted_names(node):
                yield (*path, name), node, name


def variable_of(holder: Holder, name: str) -> nnx.Variable:
    """Returns the variable of the base leaf `name`, frozen or packed."""
    frozen = adapter_of(holder, name).frozen
    return attributes(holder)[name] if frozen is None else frozen


def base_of(holder: Holder, name: str) -> Leaf:
    """Returns the kernel `name`: a QTensor, a StraightThrough or a float array."""
    adapter = adapter_of(holder, name)
    value = variable_of(holder, name).get_value()
    if adapter.trained_packing is None:
        return value
    # Trained through its quantizer: the variable is a float `nnx.Param`.
    return StraightThrough(value, adapter.trained_packing, adapter.geometry)


def packed_variable(
    variable: nnx.Variable, value: Leaf, path: str, cls: type[P] = Packed
) -> P:
    """Returns the variable of a packed or frozen value that replaces a float one."""
    metadata = tuple(sorted(variable.get_metadata().items()))  # hashable
    settings: dict[str, Any] = {"float_type": type(variable), "path": Note(path)}
    return cls(value, float_metadata=metadata, **settings)


def float_variable(variable: nnx.Variable, value: Float[Array, "..."]) -> nnx.Variable:
    """Returns a float variable like the one that `packed_variable` replaced."""
    if not isinstance(variable, Packed):
        return variable.copy(value)
    metadata = dict(variable.get_metadata("float_metadata"))
    return variable.get_metadata("float_type").from_metadata(value, metadata)


def join_path(path: KeyPath) -> str:
    """Returns a path as a string that patterns can match: "layers/0/q_proj/kernel"."""
    return "/".join(map(str, path))
