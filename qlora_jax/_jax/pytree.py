"""Registers and serializes pytree nodes, and splits trees for tracing."""

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax import export, lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree

from .modes import call_in_auto_mode
from .specs import spec_of


class TreeLeaf:
    """The base class of pytree nodes that count as one leaf of a parameter tree."""

    @property
    def nbytes(self) -> int:
        """The size of the stored arrays in bytes."""
        return count_bytes(self)


def count_bytes(tree: PyTree) -> int:
    """Returns the size of all arrays of a tree, or of their shapes, in bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def is_tree_leaf(node: object) -> bool:
    """Whether a node counts as one leaf of a parameter tree."""
    return isinstance(node, TreeLeaf)


class Note(str):
    """A static string that equals every other Note, so that `jit` does not retrace."""

    # Notes are therefore all the same key of a dict. Use `str(note)` as a key.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __ne__(self, other: object) -> bool:
        return not self == other  # `str` would compare the characters

    def __hash__(self) -> int:
        return 0


def is_box(leaf: object) -> bool:
    """Whether a leaf is a box around an array, such as Flax's `nn.Partitioned`."""
    return not isinstance(leaf, TreeLeaf) and hasattr(leaf, "replace_boxed")


def unbox(leaf: PyTree) -> PyTree:
    """Returns the value in a box. Other leaves are returned as they are."""
    if not is_box(leaf):
        return leaf
    try:
        return leaf.unbox(apply_constraint=False)
    except TypeError:  # some boxes have no such argument
        return leaf.unbox()


def rebox(leaf: PyTree, value: PyTree) -> PyTree:
    """Returns `value` in the box of `leaf`, if there is one and `value` has none."""
    return leaf.replace_boxed(value) if is_box(leaf) and not is_box(value) else value


def register(
    cls: type,
    leaves: tuple[str, ...],
    static: tuple[str, ...],
    serialized_name: str | None = None,
) -> None:
    """Registers a frozen dataclass with array fields and hashable static fields.

    With a `serialized_name`, `jax.export` and Flax's state dicts support the class,
    which gets an attribute `tree_fields`: the names of the leaves and of the static
    fields.
    """
    keys = tuple(map(jax.tree_util.GetAttrKey, leaves))

    def flatten(node: Any) -> tuple[tuple, tuple]:
        aux = tuple(getattr(node, name) for name in static)
        return tuple(getattr(node, name) for name in leaves), aux

    def flatten_with_keys(node: Any) -> tuple[tuple, tuple]:
        values, aux = flatten(node)
        return tuple(zip(keys, values, strict=True)), aux

    def unflatten(aux: tuple, values: Iterable) -> Any:
        # Bypasses `__init__`: JAX rebuilds nodes with placeholders, PartitionSpecs and
        # None as leaves, which checks would reject.
        node = object.__new__(cls)
        for name, value in (*zip(static, aux), *zip(leaves, values)):  # noqa: B905
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    setattr(cls, "tree_fields", (leaves, static))  # noqa: B010
    if serialized_name is not None:
        SERIALIZED.append(cls)
        for register_state in STATE_REGISTRARS:
            register_state(cls)
        export.register_pytree_node_serialization(
            cls,
            serialized_name=serialized_name,
            serialize_auxdata=lambda aux: static_to_json(cls, aux, static).encode(),
            deserialize_auxdata=lambda data: static_from_json(
                cls, bytes(data).decode(), static
            ),
        )


# `jax.export` and Flax's state dicts store nodes as plain data. Static fields are JSON
# instead of Python objects, so that loading a file cannot run code.
SERIALIZED: list[type] = []  # the node types that files may contain
# Functions that register such a type with Flax, once the integrations are imported.
STATE_REGISTRARS: list[Callable[[type], None]] = []


def static_to_json(node_type: type, values: tuple, field_names: tuple[str, ...]) -> str:
    """Returns static fields as JSON. Raises TypeError if they are not plain data."""
    fields = dict(zip(field_names, values, strict=True))
    try:
        return json.dumps(fields, sort_keys=True, default=dataclasses.asdict)
    except TypeError as error:
        raise TypeError(
            f"the static fields of {node_type.__name__} must be plain data to be "
            f"serialized. Got {fields}."
        ) from error


def static_from_json(node_type: type, text: str, field_names: tuple[str, ...]) -> tuple:
    """Returns the static fields that `static_to_json` stored."""
    fields = json.loads(text)
    types = typing.get_type_hints(node_type)
    return tuple(_from_json(types[name], fields[name]) for name in field_names)


def _from_json(field_type: Any, value: Any) -> object:
    # JSON turns dataclasses into objects and tuples into lists.
    if isinstance(value, dict):
        # The type may be a union, such as `Placement | None`.
        options = (field_type, *typing.get_args(field_type))
        cls: type = next(filter(dataclasses.is_dataclass, options))
        types = typing.get_type_hints(cls)
        return cls(**{name: _from_json(types[name], x) for name, x in value.items()})
    if isinstance(value, list):
        return tuple(_from_json(None, x) for x in value)
    return value


def register_states() -> None:
    """Tells Flax how to make state dicts of all nodes that `jax.export` supports."""
    from flax import serialization

    def to_state(node: Any) -> dict[str, object]:
        to_dict = serialization.to_state_dict
        state = {name: to_dict(getattr(node, name)) for name in node.tree_fields[0]}
        return {**state, "settings": _settings(node)}

    def from_state(node: Any, state: dict[str, Any]) -> object:
        leaves, settings = node.tree_fields[0], _settings(node)
        if set(state) != {*leaves, "settings"} or state["settings"] != settings:
            raise ValueError(
                f"{type(node).__name__} must be restored from a state with its own "
                f"fields and settings, {settings}. Got {sorted(state)} with "
                f"{state.get('settings')}."
            )
        restored = {
            name: serialization.from_state_dict(getattr(node, name), state[name], name)
            for name in leaves
        }
        return dataclasses.replace(node, **restored)

    def register_state(node_type: type) -> None:
        serialization.register_serialization_state(
            node_type, to_state, from_state, override=True
        )

    for node_type in SERIALIZED:
        register_state(node_type)
    STATE_REGISTRARS.append(register_state)


def _settings(node: Any) -> str:
    leaves, static = node.tree_fields
    # The placement is left out, because a later run may use another mesh.
    field_names = tuple(name for name in static if name not in ("placement", *leaves))
    values = tuple(getattr(node, name) for name in field_names)
    return static_to_json(type(node), values, field_names)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array or the shape of one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def split_arrays(
    tree: PyTree,
    is_traced: Callable[[Any], bool] = is_array,
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[list, Callable[[list], PyTree]]:
    """Returns the arrays (or shapes) in `tree`, and a function that replaces them.

    Transformations then trace only the arrays. Flags such as `deterministic` remain
    Python values, and the list has None in their place.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf)

    def rebuild(arrays: list) -> PyTree:
        pairs = zip(leaves, arrays, strict=True)
        return treedef.unflatten(x if new is None else new for x, new in pairs)

    return [leaf if is_traced(leaf) else None for leaf in leaves], rebuild


def on_arrays(
    transform: Callable[[Callable], Callable],
    fn: Callable[..., PyTree],
    inputs: PyTree,
    *state: PyTree,
    split: Callable[[PyTree], tuple[list, Callable]] = split_arrays,
) -> PyTree:
    """Returns `transform(fn)(*state, inputs)`, which traces only arrays of `inputs`.

    `transform` is `jax.checkpoint`, or Flax's version, whose `state` is a module.
    The flags in the inputs and outputs of `fn` remain Python values.
    """
    arrays, rebuild = split(inputs)
    # Tracing `fn` shows the structure of its outputs. The last trace is used.
    rebuild_outputs: list[Callable[[list], PyTree]] = []

    def run_on_arrays(*operands: PyTree) -> list:
        *state, arrays = operands
        outputs, rebuild_output = split(fn(*state, rebuild(arrays)))
        rebuild_outputs.append(rebuild_output)
        return outputs

    outputs = transform(run_on_arrays)(*state, arrays)
    return rebuild_outputs[-1](outputs)


def take_layer(tree: PyTree, index: Int[Array, ""] | int) -> PyTree:
    """Returns entry `index` along the first axis of each array in a tree."""

    def slice_first_axis(stack: Array, index: Int[Array, ""] | int) -> Array:
        return lax.dynamic_index_in_dim(stack, index, keepdims=False)

    def take(stack: Array) -> Array:
        # The stack may be split along its layers, and Explicit mode has no rule for a
        # slice of a split axis.
        return call_in_auto_mode(
            slice_first_axis, lambda _: PartitionSpec(*spec_of(stack)[1:]), stack, index
        )

    return jax.tree.map(take, tree)
