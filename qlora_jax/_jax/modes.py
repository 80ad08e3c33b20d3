"""Explicit sharding mode: meshes of arrays, and functions that run in Auto mode."""

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

from .specs import make_spec, spec_of, typed_axes, unused


def explicit_mesh(*trees: Any) -> Any:
    """Returns the mesh with Explicit axes that any leaf is typed with, or None."""
    return _mesh_of(map(jax.typeof, jax.tree.leaves(trees)))


def _mesh_of(types: Iterable) -> Any:
    for found in types:
        mesh = getattr(getattr(found, "sharding", None), "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def axes_of_type(mesh: Any, kind: AxisType) -> frozenset[str]:
    """Returns the names of a mesh's axes of a type."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, found in kinds if found == kind)


def explicit_axes(mesh: Any) -> frozenset[str]:
    """Returns the names of a mesh's Explicit axes, without those of a vmap."""
    # Types inside `jax.vmap` do not tell which mesh axes split the mapped axis. A
    # `shard_map` without names is over all axes but these.
    found: list[Any] = []
    look = lambda: found.append(get_abstract_mesh().manual_axes)
    jax.eval_shape(jax.shard_map(look, mesh=mesh, in_specs=(), out_specs=None))
    return axes_of_type(mesh, AxisType.Explicit).intersection(*found)


def split_by(x: Any, mesh: Any, spec: Iterable) -> Any:
    """Returns an array that is split over a mesh with Explicit axes as `spec` says."""
    return reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def without_mapped_axes(mesh: Any, *trees: Any) -> Any:
    """Returns trees whose arrays are not split over the mesh axes of a vmap."""
    # JAX splits results over those already, and does not accept two uses of one.
    names = explicit_axes(mesh)

    def gather(x: Any) -> Any:
        axes = typed_axes(x)
        kept = [unused(entry, {*entry} - names) for entry in axes]
        return x if kept == axes else split_by(x, mesh, make_spec(*kept))

    return jax.tree.map(gather, trees)


def with_mapped_axis(size: int, x: Any, is_mapped: bool) -> Any:
    """Returns an operand of a vmap with the mapped axis in front."""
    return x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))


def is_manual() -> bool:
    """Whether this is traced inside a `shard_map` over all mesh axes."""
    context = get_abstract_mesh()
    return not context.empty and {*context.axis_types} == {AxisType.Manual}


def is_local() -> bool:
    """Whether arrays without a declared sharding are surely those of one device."""
    return is_manual() or jax.device_count() == 1


def varying_with(x: Any, *trees: Any) -> Any:
    """Marks `x` as varying over the axes of a `shard_map` that any leaf varies over."""
    # A custom gradient has the type of its operand. Where x is the same on all devices
    # and other operands are not, the mark makes JAX sum the gradient over the devices.
    own, *types = map(jax.typeof, jax.tree.leaves((x, trees)))
    axes = set().union(*(found.manual_axis_type.varying for found in types))
    missing = tuple(sorted(axes - own.manual_axis_type.varying))
    return lax.pcast(x, missing, to="varying") if missing else x


def for_product(x: Any, *trees: Any) -> tuple[Any, ...]:
    """Returns the Explicit mesh of a product, or None, and operands that fit it."""
    x = varying_with(x, *trees)
    mesh = _mesh_of(map(jax.typeof, jax.tree.leaves((x, trees))))
    if mesh is None:
        return None, x, *trees
    return mesh, *without_mapped_axes(mesh, x, *trees)


def split_as(x: Any, y: Any) -> Any:
    """Returns `x`, whose axes are those of `y` or 1, split as `y` is, to be added."""
    # Explicit mode refuses to add arrays that are split in different ways.
    mesh = explicit_mesh(x, y)
    if mesh is None:
        return x
    pairs = zip(spec_of(y), x.shape, y.shape, strict=True)
    spec = (entry if a == b else None for entry, a, b in pairs)
    return split_by(x, jax.typeof(y).sharding.mesh, spec)


def in_auto_mode(fn: Callable, mesh: Any, out_specs: Any) -> Callable:
    """Wraps `fn` to run with every axis of `mesh` in Auto mode."""
    # For operations such as splitting rows into blocks and look-ups, which have no
    # sharding rule that Explicit mode accepts for every spec.
    with_mesh = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        out_specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.sharding.auto_axes(fn, out_sharding=with_mesh)


def call_in_auto_mode(fn: Callable, out_specs: Callable[[Any], Any], *args: Any) -> Any:
    """Returns `fn(*args)`, in Auto mode if any array has Explicit mesh axes.

    `out_specs` maps their mesh to the specs of the results.
    """
    mesh = explicit_mesh(args)
    return fn(*args) if mesh is None else in_auto_mode(fn, mesh, out_specs(mesh))(*args)
