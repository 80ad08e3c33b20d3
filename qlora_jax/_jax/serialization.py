"""Stores pytree nodes as plain data, for `jax.export` and Flax's state dicts.

Static fields are stored as JSON instead of Python objects, so that loading a file
cannot run code.
"""

import dataclasses
import json
import typing
from typing import Any

from jax import export

SERIALIZED: list[type] = []  # the node types that files may contain


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

    for node_type in SERIALIZED:
        serialization.register_serialization_state(
            node_type, to_state, from_state, override=True
        )


def _settings(node: Any) -> str:
    # The placement is left out, because a later run may use another mesh.
    field_names = tuple(name for name in node.tree_fields[1] if name != "placement")
    values = tuple(getattr(node, name) for name in field_names)
    return static_to_json(type(node), values, field_names)
