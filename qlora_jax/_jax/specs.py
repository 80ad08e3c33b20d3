"""PartitionSpec algebra."""

from typing import Any

import jax
from jax.sharding import PartitionSpec


def spec_of(x: Any) -> tuple:
    """Returns one entry for each axis of `x`: the mesh axes that shard it, or None."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def divides(mesh: Any, entry: Any, size: int) -> bool:
    """Whether an axis of `size` can be sharded over the mesh axes of a spec's entry."""
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    ways = 1
    for name in names:
        ways *= mesh.shape[name]
    return size % ways == 0


def fitting_spec(mesh: Any, spec: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """Drops from `spec` what cannot shard `shape`, and repeated mesh axes."""
    seen: set = set()
    entries: list = []
    for entry, size in zip(spec, shape, strict=True):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if not divides(mesh, entry, size) or seen.intersection(names):
            entry, names = None, ()
        seen.update(names)
        entries.append(entry)
    return PartitionSpec(*entries)
