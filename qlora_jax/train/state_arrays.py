"""The arrays of a state: copies, names, shapes."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from .mesh_arrays import mesh_of
from .step import State


def copy(x: jax.Array) -> Any:
    """Copies an array, since the next step overwrites the donated state."""
    if mesh_of(x) is None:
        return np.array(x)
    # Orbax copies an accelerator's arrays to the host before `save` returns. It may
    # keep views of a CPU's, and of those in host memory.
    is_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
    if not is_cpu and x.sharding.memory_kind == "device":
        return x
    copy_part = lambda part: jax.device_put(np.array(part), part.sharding)
    parts = [copy_part(part.data) for part in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def by_name(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by names such as "lora.layers.kernel.a"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
    return {name(path): x for path, x in leaves}


def shapes_of(like: State) -> State:
    """Returns the shapes of a state as saved, with shardings and the key's data."""
    data = jax.eval_shape(jax.random.key_data, like.key)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    of_key = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=like.key.sharding)
    return jax.tree.map(shape, like._replace(key=of_key))


def changes(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    text: Callable[[Any], str],
    missing: str,
) -> list[str]:
    """Returns "name was ..., is ..." for each entry whose text differs."""
    say = lambda entries, name: text(entries[name]) if name in entries else missing
    return [
        f"{name} was {say(then, name)}, is {say(now, name)}"
        for name in sorted({*then, *now})
        if say(then, name) != say(now, name)
    ]


def compare(have: dict[str, Any], want: dict[str, Any], folder: pathlib.Path) -> None:
    """Refuses a saved state that has other arrays than a run."""
    kind = lambda x: f"{np.dtype(x.dtype)}{list(x.shape)}"
    if problems := changes(have, want, kind, missing="nothing"):
        raise ValueError(
            f"the state in {folder} must be that of this run. Got others: "
            f"{'; '.join(problems)}."
        )
