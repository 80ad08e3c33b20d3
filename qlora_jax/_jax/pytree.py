"""Pytree nodes that JAX can rebuild around anything, and trees split for tracing."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .modes import call_in_auto_mode
from .serialization import register_export
from .specs import spec_of

T = TypeVar("T", bound=type)


class TreeLeaf:
    """Base of the pytree nodes that count as one leaf of a parameter tree."""

    @property
    def nbytes(self) -> int:
        """Bytes that the stored arrays take."""
        leaves = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def is_tree_leaf(node: Any) -> bool:
    """Whether a node counts as one leaf of a parameter tree."""
    return isinstance(node, TreeLeaf)


class Note(str):
    """A string that compares equal to any other: paths do not cause a retrace."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a box around an array, such as Flax's `nn.Partitioned`."""
    return hasattr(leaf, "unbox") and hasattr(leaf, "replace_boxed")


def unbox(leaf: Any) -> Any:
    """Takes a value out of its box, if it has one."""
    if not is_box(leaf):
        return leaf
    try:
        return leaf.unbox(apply_constraint=False)
    except TypeError:
        return leaf.unbox()


def rebox(leaf: Any, value: Any) -> Any:
    """Puts a value into the box of a leaf, if it has one; a new box replaces it."""
    return leaf.replace_boxed(value) if is_box(leaf) and not is_box(value) else value


def register(
    cls: T,
    leaves: tuple[str, ...],
    static: tuple[str, ...],
    serialized_name: str | None = None,
) -> T:
    """Registers a frozen dataclass by its array fields and its hashable fields.

    With a `serialized_name`, files of `jax.export` may store such nodes. Returns `cls`,
    with the names as `tree_fields`.
    """

    def flatten(self: Any) -> tuple[tuple, tuple]:
        aux = tuple(getattr(self, name) for name in static)
        return tuple(getattr(self, name) for name in leaves), aux

    def flatten_with_keys(self: Any) -> tuple[tuple, tuple]:
        values, aux = flatten(self)
        keys = (jax.tree_util.GetAttrKey(name) for name in leaves)
        return tuple(zip(keys, values, strict=True)), aux

    def unflatten(aux: tuple, values: Any) -> Any:
        # Not by `__init__`: JAX puts placeholders, PartitionSpecs and None where arrays
        # were, and checks on those would fail.
        self = object.__new__(cls)
        for name, value in zip((*leaves, *static), (*values, *aux), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    setattr(cls, "tree_fields", (leaves, static))  # noqa: B010
    if serialized_name is not None:
        register_export(cls, serialized_name, static)
    return cls


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    kinds = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(leaf, kinds)


def split_arrays(
    tree: Any,
    is_traced: Callable[[Any], bool] = is_array,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[list, Callable[[list], Any]]:
    """Returns the arrays (or shapes) in `tree`, and a function that replaces them.

    Flags such as `deterministic` stay Python values where JAX traces the arrays alone.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf)
    places = [i for i, x in enumerate(leaves) if is_traced(x)]

    def rebuild(arrays: list) -> Any:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return jax.tree.unflatten(treedef, whole)

    return [leaves[i] for i in places], rebuild


def on_arrays(
    transform: Callable[[Callable], Callable],
    fn: Callable[..., Any],
    inputs: Any,
    *state: Any,
    split: Callable[[Any], tuple[list, Callable]] = split_arrays,
) -> Any:
    """Returns `transform(fn)(*state, inputs)`, of which the arrays alone are traced.

    For `jax.checkpoint` and those of Flax: `fn` sees and returns flags as they are.
    """
    arrays, rebuild = split(inputs)
    to_output: list[Callable[[list], Any]] = []

    def run(*operands: Any) -> list:
        *state, arrays = operands
        outputs, rebuild_output = split(fn(*state, rebuild(arrays)))
        to_output.append(rebuild_output)
        return outputs

    outputs = transform(run)(*state, arrays)
    return to_output[-1](outputs)


def take_layer(tree: Any, index: Any) -> Any:
    """Returns a tree of stacked arrays without their first axis, at one index."""

    def take(a: Any) -> Any:
        cut = lambda a, index: lax.dynamic_index_in_dim(a, index, keepdims=False)
        # The stack may be split along its layers, which a plain slice refuses.
        spec = lambda _: PartitionSpec(*spec_of(a)[1:])
        return call_in_auto_mode(cut, spec, a, index)

    return jax.tree.map(take, tree)
