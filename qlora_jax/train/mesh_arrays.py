"""State and batches on a mesh of devices, perhaps of several processes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh that a tree is on; None for a single device."""
    for x in jax.tree.leaves(tree):
        if isinstance(getattr(x, "sharding", None), NamedSharding):
            return x.sharding.mesh
    return None


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on a mesh; arrays that are not on one are replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    is_there = lambda x: isinstance(x.sharding, NamedSharding)
    return jax.tree.map(lambda x: x if is_there(x) else jax.device_put(x, whole), tree)


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
    return jax.tree.map(lambda x: np.asarray(_whole(x)), tree)


def _whole(x: jax.Array) -> jax.Array:
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    whole = NamedSharding(mesh_of(x), PartitionSpec())  # pyright: ignore
    return jax.jit(lambda x: x, out_shardings=whole)(x)
