"""Checks arrays that are deleted once they are packed."""

from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.memory import is_device_array, memory_of


def check_donated(leaves: Mapping[str, Any], paths: Container[str]) -> None:
    """Raises ValueError if a float array at one of `paths` is at another path too."""
    owners: dict = {}
    for path, leaf in leaves.items():
        for array in jax.tree.leaves(leaf):
            if is_device_array(array) and jnp.issubdtype(array.dtype, jnp.floating):
                owners.setdefault(memory_of(array), []).append(path)
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
