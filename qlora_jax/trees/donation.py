"""Float arrays that are deleted once they are packed."""

from collections.abc import Container

import jax
import jax.numpy as jnp

from .._jax.memory import is_device_array, memory_of
from .paths import Tree, leaves_by_path


def check_donated(tree: Tree, paths: Container[str]) -> None:
    """Refuses to donate what is used twice.

    Args:
        tree: The tree.
        paths: Where float arrays are to be deleted.

    Raises:
        ValueError: If such an array is at another path too; the paths are named.
    """
    owners: dict = {}
    for path, leaf in leaves_by_path(tree).items():
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
