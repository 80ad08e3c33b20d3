"""Which arrays are stacks: their first axis is an axis of layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.modes import explicit_mesh
from .._jax.specs import spec_of
from ..adapters.patterns import matches
from ..trees.paths import Tree, path_string


def stack_sizes(tree: Tree, stacks: str | Sequence[str]) -> list[int]:
    """Returns the layers of each array, 0 for one that is no stack.

    Raises:
        ValueError: If a pattern of `stacks` matches no array.
    """
    is_known = lambda node: hasattr(node, "stacked")
    is_stack = lambda node: node.stacked() if is_known(node) else False
    known = jax.tree.leaves(jax.tree.map(is_stack, tree, is_leaf=is_known))
    flat = [
        (path_string(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    patterns = (stacks,) if isinstance(stacks, str) else tuple(stacks)
    unmatched = [p for p in patterns if not any(matches(p, path) for path, _ in flat)]
    # `optax.tree_utils` calls `init` on trees without arrays.
    if unmatched and any(hasattr(x, "shape") for _, x in flat):
        raise ValueError(
            "every pattern of `stacks` must match the path of an array. Got "
            f"{unmatched}, which match none of {[path for path, _ in flat]}."
        )
    # A stack of one layer gains nothing.
    return [
        x.shape[0] if _can_be_sliced(x) and (found or matches(patterns, path)) else 0
        for found, (path, x) in zip(known, flat, strict=True)
    ]


def _can_be_sliced(x: Any) -> bool:
    if jnp.ndim(x) == 0 or x.shape[0] == 1:
        return False
    # JAX does not slice an axis that is split among devices by type.
    return explicit_mesh(x) is None or spec_of(x)[0] is None
