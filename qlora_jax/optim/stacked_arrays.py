"""Finds stacks: arrays whose first axis is an axis of layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.modes import explicit_mesh
from .._jax.specs import spec_of
from ..adapters.patterns import matches, unmatched_by
from ..trees.paths import Tree, paths_where
from .layerwise import NotByLayers


def stack_sizes(tree: Tree, stacks: str | Sequence[str]) -> list[int]:
    """Returns the number of layers of each array, 0 for one that is no stack."""
    is_known = lambda node: hasattr(node, "stacked")
    is_stack = lambda node: is_known(node) and node.stacked()
    known = jax.tree.leaves(jax.tree.map(is_stack, tree, is_leaf=is_known))
    leaves, paths = jax.tree.leaves(tree), paths_where(lambda _: True, tree)
    patterns = (stacks,) if isinstance(stacks, str) else tuple(stacks)
    unmatched = unmatched_by(patterns, paths)
    # `optax.tree_utils` calls `init` on trees without arrays.
    if unmatched and any(hasattr(x, "shape") for x in leaves):
        raise ValueError(
            "every pattern of `stacks` must match the path of an array. Got "
            f"{unmatched}, which match none of {paths}."
        )
    # A stack of one layer gains nothing.
    return [
        x.shape[0] if can_be_sliced(x) and (found or matches(patterns, path)) else 0
        for found, path, x in zip(known, paths, leaves, strict=True)
    ]


def can_be_sliced(x: Any) -> bool:
    """Whether layers on the first axis of an array can be taken one by one."""
    if jnp.ndim(x) == 0 or x.shape[0] == 1:
        return False
    # JAX does not slice an axis that is split among devices by type.
    return explicit_mesh(x) is None or spec_of(x)[0] is None


def state_sizes(
    init: Callable[[Tree], Tree], params: Tree, sizes: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[int], Any]:
    """Returns the state's shapes, the layers of each array, and its structure.

    State arrays that grow by a layer where the parameters do are stacks.
    """
    leaves, params_def = jax.tree.flatten(params)
    grown = [
        jax.ShapeDtypeStruct((n + 1, *x.shape[1:]), x.dtype) if n else x
        for x, n in zip(leaves, sizes, strict=True)
    ]
    state, treedef = jax.tree.flatten(jax.eval_shape(init, params))
    try:
        made = jax.eval_shape(init, params_def.unflatten(grown))
    except Exception as error:  # `init` may raise anything
        raise NotByLayers(f"`init` fails on arrays of other sizes: {error}") from error
    if jax.tree.structure(made) != treedef:
        raise NotByLayers("the structure of the state depends on sizes")

    def layers(x: Any, y: Any) -> int:
        if x.shape == y.shape:
            return 0
        n, *rest = x.shape or (0,)
        if n and n in sizes and y.shape == (n + 1, *rest):
            return n
        raise NotByLayers(f"the state has an array of shape {x.shape}, not a stack")

    found = list(map(layers, state, jax.tree.leaves(made)))
    return [x.shape for x in state], found, treedef
