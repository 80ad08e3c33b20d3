"""Computes with PartitionSpecs.

Here, the `Axes` of an array axis are the mesh axes that split it, outermost first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

Axes = tuple[str, ...]
AnyMesh = Mesh | AbstractMesh
# An entry of a PartitionSpec: the mesh axes that split one axis of an array.
SpecEntry = str | Sequence[str] | None


def axes_of(entry: SpecEntry) -> Axes:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        return tuple(entry)
    return (entry,)


def make_spec(*axes: Axes) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose axes are split by these mesh axes."""
    return PartitionSpec(*(a if len(a) > 1 else a[0] if a else None for a in axes))


def num_parts(sizes: Mapping[str, int], axes: Axes) -> int:
    """Returns the number of parts into which mesh axes split an array axis."""
    return math.prod(sizes[axis] for axis in axes)


def free_prefix(axes: Axes, used: set[str]) -> Axes:
    """Returns the axes before the first one in `used`."""
    # The first axes split an array into contiguous parts. If one of them were left out
    # and a later one kept, each device would hold pieces from all over the array.
    for i, axis in enumerate(axes):
        if axis in used:
            return axes[:i]
    return axes


def dividing_prefix(axes: Axes, sizes: Mapping[str, int], *lengths: int) -> Axes:
    """Returns the longest prefix whose number of parts divides all lengths."""
    for count in range(len(axes), 0, -1):
        if all(length % num_parts(sizes, axes[:count]) == 0 for length in lengths):
            return axes[:count]
    return ()


def spec_of(x: Array) -> tuple[SpecEntry, ...]:
    """Returns the spec of the type of `x`, in which Auto mesh axes are not visible."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def mesh_axes(x: Array) -> list[Axes]:
    """Returns the mesh axes that split each axis of `x`, by `spec_of(x)`."""
    return [axes_of(entry) for entry in spec_of(x)]


def fitting_spec(
    mesh: AnyMesh, spec: Iterable[SpecEntry], shape: Sequence[int]
) -> PartitionSpec:
    """Drops whole entries that do not divide their axis or that repeat a mesh axis."""
    used: set[str] = set()
    entries: list[SpecEntry] = []
    for entry, size in zip(spec, shape, strict=True):
        axes = axes_of(entry)
        if size % num_parts(mesh.shape, axes) or used.intersection(axes):
            entry, axes = None, ()
        used.update(axes)
        entries.append(entry)
    return PartitionSpec(*entries)
