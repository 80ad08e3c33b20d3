"""Arrays of a training state and of batches: on a mesh, copied, by name."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh that a tree is on; None for a single device."""
    for x in jax.tree.leaves(tree):
        if isinstance(getattr(x, "sharding", None), NamedSharding):
            return x.sharding.mesh
    return None


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on a mesh; arrays that are not on one are replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    is_there = lambda x: isinstance(x.sharding, NamedSharding)
    put = lambda x: x if is_there(x) else jax.device_put(x, everywhere)
    return jax.tree.map(put, tree)


def shapes_like(tree: Any, like: Any, other: jax.ShapeDtypeStruct) -> Any:
    """Returns the shapes of `tree` with the shardings of `like`; None is replicated.

    `tree` has shapes, dtypes and memory spaces; `other` is a leaf on the same devices.
    """

    def place(x: Any, own: Any) -> jax.ShapeDtypeStruct:
        sharding = (other if own is None else own).sharding
        if own is None and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        if x.memory_space == jax.memory.Space.Host:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # `flatten_up_to` keeps the None of `like` as leaves.
    leaves, structure = jax.tree.flatten(tree)
    owners = structure.flatten_up_to(like)
    return structure.unflatten(map(place, leaves, owners))


def put_rows(batch: Any, mesh: Mesh, axes: Sequence[str]) -> Any:
    """Puts a batch, which all processes have, on a mesh with its rows split."""
    sharding = NamedSharding(mesh, PartitionSpec(tuple(axes) or None))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def gather(tree: Any) -> Any:
    """Returns a tree of full NumPy arrays. All processes must call it."""
    is_here = lambda x: x.is_fully_addressable or x.is_fully_replicated
    all_of = lambda x: multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x) if is_here(x) else all_of(x), tree)


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


def shapes_of(like: Any) -> Any:
    """Returns the shapes of a state as saved, with shardings and the key's data."""
    struct = lambda x, own: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=getattr(own, "sharding", None)
    )
    key = struct(jax.eval_shape(jax.random.key_data, like.key), like.key)
    return jax.tree.map(lambda x: struct(x, x), like._replace(key=key))


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
