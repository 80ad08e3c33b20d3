"""Whether arrays are concrete, where they are, and when they can be freed."""

import functools
import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

HOST_KIND = "pinned_host"  # `memory_kind` of arrays in host memory


def is_concrete(w: Any) -> bool:
    """Whether `w` is concrete (not a tracer)."""
    return isinstance(w, np.ndarray | jax.Array) and not isinstance(w, Tracer)


@functools.partial(jax.jit, static_argnames="limit")
def _all_below(w: Any, limit: float) -> Any:
    return jnp.all(jnp.abs(w) < limit)


def all_below(w: Any, limit: float) -> bool:
    """Whether every value of an array is below `limit` in magnitude; NaN is not."""
    if w.dtype.itemsize == 1:  # not every float8 has an infinity
        w = w.astype(np.float32)
    if limit > float(jnp.finfo(w.dtype).max):
        limit = math.inf
    # A trace may close over an array that has values: those are looked at.
    with jax.ensure_compile_time_eval():
        return bool(_all_below(w, limit))


def _is_deletable(x: Any) -> bool:
    """Whether `x` is a JAX array whose memory can be freed now."""
    return isinstance(x, jax.Array) and is_concrete(x)


def _memory_of(array: jax.Array) -> Any:
    """Identifies an array's memory: `device_put` may give two arrays one buffer."""
    shards = array.addressable_shards
    if not (array.size and shards):
        return id(array)
    return shards[0].device, shards[0].data.unsafe_buffer_pointer()


def delete(w: Any, q: Any) -> None:
    """Deletes a float JAX array once `q` is made from it, but not under a trace."""
    if _is_deletable(w) and all(map(is_concrete, jax.tree.leaves(q))):
        jax.block_until_ready(q)
        w.delete()


def check_donated(leaves: Mapping[str, Any], paths: Container[str]) -> None:
    """Raises ValueError if a float array at one of `paths` is at another path too."""
    owners: dict = {}
    for path, leaf in leaves.items():
        for array in jax.tree.leaves(leaf):
            if _is_deletable(array) and jnp.issubdtype(array.dtype, jnp.floating):
                owners.setdefault(_memory_of(array), []).append(path)
    shared = [
        found
        for found in owners.values()
        if len(found) > 1 and any(path in paths for path in found)
    ]
    if shared:
        raise ValueError(
            "`donate` must be False where leaves share an array, which would be "
            f"deleted for both. Got {shared}. Copy one of each first."
        )
