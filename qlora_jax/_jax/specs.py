"""PartitionSpec algebra.

The *axes* of an array axis are the tuple of mesh axes that split it, outermost first.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

Axes = tuple[str, ...]


def axes_of(entry: Any) -> Axes:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def make_spec(*axes: Axes) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these axes."""
    return PartitionSpec(*(a if len(a) > 1 else a[0] if a else None for a in axes))


def ways(sizes: Mapping[str, int], axes: Axes) -> int:
    """Returns into how many parts mesh axes of these sizes split an array axis."""
    return math.prod(sizes[axis] for axis in axes)


def unused(axes: Axes, used: set[str]) -> Axes:
    """Returns the axes before the first used one: they split into contiguous parts."""
    for i, axis in enumerate(axes):
        if axis in used:
            return axes[:i]
    return axes


def fitting(axes: Axes, sizes: Mapping[str, int], *lengths: int) -> Axes:
    """Returns as many of the axes, from the first on, as divide all lengths."""
    for count in range(len(axes), 0, -1):
        if all(length % ways(sizes, axes[:count]) == 0 for length in lengths):
            return axes[:count]
    return ()


def spec_of(x: Any) -> tuple:
    """Returns one entry for each axis of `x`: the mesh axes that shard it, or None."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def typed_axes(x: Any) -> list[Axes]:
    """Returns the Explicit mesh axes that split each axis of `x`, by its type."""
    return [axes_of(entry) for entry in spec_of(x)]


def fitting_spec(mesh: Any, spec: Any, shape: Sequence[int]) -> PartitionSpec:
    """Drops from `spec` what cannot shard `shape`, and repeated mesh axes."""
    seen: set[str] = set()
    entries: list = []
    for entry, size in zip(spec, shape, strict=True):
        axes = axes_of(entry)
        if size % ways(mesh.shape, axes) or seen.intersection(axes):
            entry, axes = None, ()
        seen.update(axes)
        entries.append(entry)
    return PartitionSpec(*entries)
