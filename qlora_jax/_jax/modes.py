"""Utilities for meshes with Explicit axes, for Auto mode and for `shard_map`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import (
    AxisType,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
    reshard,
)
from jaxtyping import Array, PyTree

from .specs import AnyMesh, Axes, SpecEntry, free_prefix, make_spec, mesh_axes, spec_of


def explicit_mesh(*trees: PyTree) -> AnyMesh | None:
    """Returns the mesh of the first leaf whose type has Explicit axes, or None."""
    for leaf in jax.tree.leaves(trees):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def axes_of_type(mesh: AnyMesh, axis_type: AxisType) -> frozenset[str]:
    """Returns the names of the mesh axes of one type."""
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in axes if kind == axis_type)


def auto_only(mesh: AnyMesh, entries: Iterable[Axes]) -> list[Axes]:
    """Returns the entries of a spec without the mesh axes that are not Auto."""
    auto = axes_of_type(mesh, AxisType.Auto)
    return [tuple(name for name in axes if name in auto) for axes in entries]


def unmapped_explicit_axes(mesh: AnyMesh) -> frozenset[str]:
    """Returns a mesh's Explicit axes, except those that split the axis of a vmap."""
    # Types inside `jax.vmap` do not show which mesh axes split the mapped axis. But a
    # `shard_map` that names no axes is manual over all mesh axes except those that
    # split the mapped axis. So this traces one, and reads its manual axes.
    manual_axes: list[frozenset[str]] = []

    def record_manual_axes() -> None:
        manual_axes.append(frozenset(get_abstract_mesh().manual_axes))

    jax.eval_shape(
        jax.shard_map(record_manual_axes, mesh=mesh, in_specs=(), out_specs=None)
    )
    return axes_of_type(mesh, AxisType.Explicit).intersection(*manual_axes)


def split_by(x: Array, mesh: AnyMesh, spec: Iterable[SpecEntry]) -> Array:
    """Returns an array resharded by `spec` over a mesh with Explicit axes."""
    return reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def with_sharding_of(x: Array, like: Array) -> Array:
    """Returns an array resharded as the type of another array says."""
    sharding = jax.typeof(like).sharding
    is_typed = AxisType.Explicit in sharding.mesh.axis_types
    return reshard(x, sharding) if is_typed else x


def without_mapped_axes(mesh: AnyMesh, *trees: PyTree) -> PyTree:
    """Gathers arrays over the mesh axes that split the axis of an enclosing vmap."""
    # JAX already splits the results of the vmap over these axes, and raises an error if
    # a mesh axis is used twice.
    unmapped = unmapped_explicit_axes(mesh)

    def gather(x: Array) -> Array:
        axes = mesh_axes(x)
        allowed = [free_prefix(entry, {*entry} - unmapped) for entry in axes]
        return x if allowed == axes else split_by(x, mesh, make_spec(*allowed))

    return jax.tree.map(gather, trees)


def with_mapped_axis(size: int, x: Array, is_mapped: bool) -> Array:
    """Returns an operand of a vmap with the mapped axis first, broadcast if needed."""
    return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))


def is_manual() -> bool:
    """Whether this code is traced inside a `shard_map` over all mesh axes."""
    context = get_abstract_mesh()
    return not context.empty and {*context.axis_types} == {AxisType.Manual}


def is_local() -> bool:
    """Whether arrays without a declared sharding are known to be on one device."""
    return jax.device_count() == 1 or is_manual()


def varying_with(x: Array, *trees: PyTree) -> Array:
    """Marks `x` as varying over each `shard_map` axis that a leaf varies over."""
    # A custom gradient must have the type of its operand. If x is the same on all
    # devices and other operands are not, this cast makes JAX sum the gradient of x over
    # the devices.
    x_type, *types = map(jax.typeof, jax.tree.leaves((x, trees)))
    axes = set().union(*(leaf_type.manual_axis_type.varying for leaf_type in types))
    missing = tuple(sorted(axes - x_type.manual_axis_type.varying))
    return lax.pcast(x, missing, to="varying") if missing else x


def split_as(x: Array, y: Array) -> Array:
    """Returns `x`, which broadcasts to `y`, split like `y` so that they can be added.

    Both have the same number of axes. An axis of `x` has the size of that of `y`, or 1.
    """
    # Explicit mode raises an error for sums of arrays that are split differently.
    if explicit_mesh(x, y) is None:
        return x
    entries = zip(spec_of(y), x.shape, y.shape, strict=True)
    spec = [entry if x_size == y_size else None for entry, x_size, y_size in entries]
    return split_by(x, jax.typeof(y).sharding.mesh, spec)


def in_auto_mode(fn: Callable, mesh: AnyMesh, out_specs: PyTree) -> Callable:
    """Wraps `fn` to run with every axis of `mesh` in Auto mode."""
    # Some operations, such as look-ups and reshapes of rows into blocks, have no
    # sharding rule that Explicit mode accepts for every spec.
    out_sharding = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)


def call_in_auto_mode(
    fn: Callable[..., Any], out_specs: Callable[[AnyMesh], PyTree], *args: PyTree
) -> Any:
    """Returns `fn(*args)`, in Auto mode if the type of any array has Explicit axes.

    `out_specs` maps the mesh of the arrays to the specs of the results.
    """
    mesh = explicit_mesh(args)
    return fn(*args) if mesh is None else in_auto_mode(fn, mesh, out_specs(mesh))(*args)
