"""Pytree nodes as plain data, for `jax.export` and Flax's state dicts.

Static fields are JSON and no Python objects are stored: a file cannot run code.
"""

import dataclasses
import json
import typing
from typing import Any

from jax import export

SERIALIZED: list[type] = []  # the node types that files may hold


def static_to_json(node_type: type, values: tuple, names: tuple[str, ...]) -> str:
    """Returns static fields as JSON; raises TypeError unless they are plain data."""
    fields = dict(zip(names, values, strict=True))
    try:
        return json.dumps(fields, sort_keys=True, default=dataclasses.asdict)
    except TypeError as error:
        raise TypeError(
            f"the static fields of {node_type.__name__} must be plain data to be "
            f"serialized. Got {fields}."
        ) from error


def static_from_json(node_type: type, text: str, names: tuple[str, ...]) -> tuple:
    """Inverts `static_to_json`."""
    found = json.loads(text)
    types = typing.get_type_hints(node_type)
    return tuple(_typed(types[name], found[name]) for name in names)


def _typed(wanted: Any, value: Any) -> Any:
    """Returns a value of JSON as the type of its field has it."""
    if isinstance(value, dict):
        options = (wanted, *typing.get_args(wanted))
        cls: Any = next(filter(dataclasses.is_dataclass, options))
        types = typing.get_type_hints(cls)
        return cls(**{name: _typed(types[name], x) for name, x in value.items()})
    if isinstance(value, list):
        return tuple(_typed(None, x) for x in value)
    return value


def register_export(
    node_type: type, serialized_name: str, static: tuple[str, ...]
) -> None:
    """Tells `jax.export` how to store the structure of a registered pytree node."""
    SERIALIZED.append(node_type)
    export.register_pytree_node_serialization(
        node_type,
        serialized_name=serialized_name,
        serialize_auxdata=lambda aux: static_to_json(node_type, aux, static).encode(),
        deserialize_auxdata=lambda data: static_from_json(
            node_type, bytes(data).decode(), static
        ),
    )


def register_states() -> None:
    """Tells Flax how to make state dicts of all that `jax.export` may store."""
    from flax import serialization

    def to_state(node: Any) -> dict[str, Any]:
        convert = serialization.to_state_dict
        state = {name: convert(getattr(node, name)) for name in node.tree_fields[0]}
        return {**state, "settings": _settings(node)}

    def from_state(node: Any, state: dict[str, Any]) -> Any:
        leaves, own = node.tree_fields[0], _settings(node)
        if set(state) != {*leaves, "settings"} or state["settings"] != own:
            raise ValueError(
                f"{type(node).__name__} must be restored from its own state, with "
                f"{own}. Got {sorted(state)} with {state.get('settings')}."
            )
        restored = {
            name: serialization.from_state_dict(getattr(node, name), state[name], name)
            for name in leaves
        }
        return dataclasses.replace(node, **restored)

    register = serialization.register_serialization_state
    for node_type in SERIALIZED:
        register(node_type, to_state, from_state, override=True)


def _settings(node: Any) -> str:
    # How a kernel is sharded may change from one run to the next.
    names = tuple(name for name in node.tree_fields[1] if name != "placement")
    values = tuple(getattr(node, name) for name in names)
    return static_to_json(type(node), values, names)
