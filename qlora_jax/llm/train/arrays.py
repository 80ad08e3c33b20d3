"""Helpers for the arrays of batches and training states."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def mesh_of(tree: PyTree) -> Mesh | None:
    """Returns the mesh that a tree is sharded over, or None for a single device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf.sharding.mesh
    return None


def put_on_mesh(tree: PyTree, mesh: Mesh) -> PyTree:
    """Replicates those arrays of a tree that are not on a mesh yet."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def put(leaf):
        is_on_mesh = isinstance(leaf.sharding, NamedSharding)
        return leaf if is_on_mesh else jax.device_put(leaf, replicated)

    return jax.tree.map(put, tree)


def with_shardings(
    shapes: PyTree, templates: PyTree, default: jax.ShapeDtypeStruct
) -> PyTree:
    """Returns `shapes` with the shardings of `templates`.

    A leaf whose template is None is replicated over the devices of `default`.
    """

    def add_sharding(leaf, template):
        sharding = (default if template is None else template).sharding
        if template is None and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        # An offloaded optimizer keeps its state in host memory between steps.
        if leaf.memory_space == jax.memory.Space.Host:
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # `jax.tree.map` takes None for an empty tree; `flatten_up_to` keeps it as a leaf.
    leaves, structure = jax.tree.flatten(shapes)
    template_leaves = structure.flatten_up_to(templates)
    return structure.unflatten(map(add_sharding, leaves, template_leaves))


def put_rows(batch: PyTree, mesh: Mesh, axes: Sequence[str]) -> PyTree:
    """Splits the rows of a batch over mesh axes. Each process has the whole batch."""
    sharding = NamedSharding(mesh, PartitionSpec(tuple(axes) or None))

    def put(x):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def gather(tree: PyTree) -> PyTree:
    """Returns a tree of full NumPy arrays. All processes must call it."""

    def gather_leaf(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather_leaf, tree)


def copy_to_save(x: jax.Array) -> jax.Array | np.ndarray:
    """Returns an array that Orbax can still write after the state is donated."""
    # On a CPU, an array and its NumPy view share memory, which the next step reuses
    # while a thread of Orbax is still writing.
    if mesh_of(x) is None:
        return np.array(x)
    # Orbax copies an accelerator's arrays to the host before `save` returns. It may
    # keep views of arrays on a CPU or in host memory, so these are copied here.
    is_cpu = next(iter(x.sharding.device_set)).platform == "cpu"
    if not is_cpu and x.sharding.memory_kind == "device":
        return x
    shards = [
        jax.device_put(np.array(shard.data), shard.data.sharding)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def leaves_by_name(state: PyTree) -> dict[str, Any]:
    """Returns the leaves of a state by names such as "lora.layers.kernel.a"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def describe_changes(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    describe: Callable[[Any], str],
    missing: str,
) -> list[str]:
    """Returns "name was ..., is ..." for each entry whose description differs.

    `missing` is the description of an entry that only the other mapping has.
    """
    lines = []
    for name in sorted({*before, *after}):
        old, new = (
            describe(entries[name]) if name in entries else missing
            for entries in (before, after)
        )
        if old != new:
            lines.append(f"{name} was {old}, is {new}")
    return lines


def check_same_arrays(
    saved: Mapping[str, Any], expected: Mapping[str, Any], folder: pathlib.Path
) -> None:
    """Raises a ValueError if the arrays of a checkpoint differ from those of a run."""

    def describe(x):
        return f"{np.dtype(x.dtype)}{list(x.shape)}"

    differences = describe_changes(saved, expected, describe, missing="nothing")
    if differences:
        raise ValueError(
            f"the checkpoint in {folder} must have the arrays of this run. Got "
            f"differences: {'; '.join(differences)}."
        )
