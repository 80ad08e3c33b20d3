"""Parameter trees by path.

A *kernel* is whatever stands at a target: a float array, a `QTensor`, a
`StraightThrough` or, in a combined tree, an `AdaptedKernel`. The *base* tree mirrors
the parameters with frozen kernels at the targets; the *lora* tree is a nested dict that
holds a `LoRA` at each target's path and nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .._jax.pytree import is_tree_leaf
from ..adapters.lora import AdaptedKernel, LoRA

Tree = Any


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a box around an array, such as Flax's `nn.Partitioned`."""
    return hasattr(leaf, "unbox") and hasattr(leaf, "replace_boxed")


def _is_leaf(node):
    return is_tree_leaf(node) or is_box(node)


def path_string(path: tuple) -> str:
    """Returns a key path as patterns see it: `"layers/0/q_proj/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Returns the tree's leaves by path; kernels, adapters and boxes are leaves."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf)
    return {path_string(path): leaf for path, leaf in flat}


def map_by_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `fn(path, leaf)` over the leaves that `leaves_by_path` lists."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: fn(path_string(path), leaf), tree, is_leaf=_is_leaf
    )


def nested(by_path: Mapping[str, Any]) -> dict:
    """Returns a nested dict with each leaf at its path."""
    tree: dict = {}
    for path, leaf in by_path.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def unbox(leaf: Any) -> Any:
    """Takes an array out of its box, if it has one."""
    if not is_box(leaf):
        return leaf
    try:
        return leaf.unbox(apply_constraint=False)
    except TypeError:
        return leaf.unbox()


def refuse_listed(title: str, problems: Sequence[str]) -> None:
    """Raises ValueError with all problems under a title, if there are any."""
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{title}:\n  {listing}")


def adapters_by_path(base: Tree, lora: Tree) -> dict[str, LoRA]:
    """Returns the adapters by path.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If one has no kernel in `base`, or is not a LoRA.
    """
    adapters = leaves_by_path(lora)
    kernels = leaves_by_path(base)
    combined = [p for p, x in kernels.items() if isinstance(x, AdaptedKernel)]
    if combined:
        raise TypeError(
            "`base` must hold no adapters: `split` a combined tree first. Got some "
            f"at {combined}."
        )
    bad = [
        path
        for path, adapter in adapters.items()
        if path not in kernels or not isinstance(adapter, LoRA)
    ]
    if bad:
        raise ValueError(
            "every leaf of `lora` must be a LoRA at the path of a kernel of `base`. "
            f"Got others at {bad}."
        )
    return adapters
