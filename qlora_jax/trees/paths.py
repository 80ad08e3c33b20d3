"""Flattens, maps and builds parameter trees by path."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from .._jax.pytree import is_box, is_tree_leaf, rebox, unbox

Tree = Any  # a pytree, mostly of parameters, with kernels and adapters as leaves
Leaf = Any  # an array or its shape, a kernel, an adapter, or an `AdaptedKernel`
KeyPath = tuple[Any, ...]  # as in `jax.tree_util`

# Leaves may be in boxes, such as Flax's `nn.Partitioned`. These functions pass the
# contents of the boxes to the caller, and put results back into the boxes.


def _is_leaf(node: object) -> bool:
    # `is_tree_leaf` is true of kernels and adapters, which JAX would flatten. It is
    # false of arrays.
    return is_tree_leaf(node) or is_box(node)


def path_string(keys: KeyPath) -> str:
    """Returns a key path as a string for patterns: `"layers/0/q_proj/kernel"`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def paths_where(predicate: Callable[[Any], object], tree: Tree) -> list[str]:
    """Returns the paths of the arrays for which `predicate` is true."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [path_string(keys) for keys, array in flat if predicate(array)]


def boxed_by_keys(tree: Tree) -> dict[KeyPath, Leaf]:
    """Returns the leaves by key path, each still in its box."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf))


def boxed_by_path(tree: Tree) -> dict[str, Leaf]:
    """Returns the leaves by path, each still in its box."""
    return {path_string(keys): leaf for keys, leaf in boxed_by_keys(tree).items()}


def leaves_by_keys(tree: Tree) -> dict[KeyPath, Leaf]:
    """Returns the leaves by key path, without boxes."""
    return {keys: unbox(leaf) for keys, leaf in boxed_by_keys(tree).items()}


def leaves_by_path(tree: Tree) -> dict[str, Leaf]:
    """Returns the leaves of a tree by path. Patterns and rules match these paths."""
    by_keys = leaves_by_keys(tree)
    leaves = {path_string(keys): leaf for keys, leaf in by_keys.items()}
    if len(leaves) < len(by_keys):
        key_texts: dict[str, list[str]] = {path: [] for path in leaves}
        for keys in by_keys:
            key_texts[path_string(keys)].append(jax.tree_util.keystr(keys))
        raise_if_any(
            "paths must differ. These are spelled alike; rename one of the keys",
            {p: " and ".join(ts) for p, ts in key_texts.items() if len(ts) > 1},
        )
    return leaves


def map_by_keys(fn: Callable[[KeyPath, Leaf], Leaf], tree: Tree) -> Tree:
    """Maps `fn(keys, leaf)` over leaves; keeps a box unless `fn` returns a box."""

    def map_leaf(keys: KeyPath, leaf: Leaf) -> Leaf:
        return rebox(leaf, fn(keys, unbox(leaf)))

    return jax.tree_util.tree_map_with_path(map_leaf, tree, is_leaf=_is_leaf)


def map_by_path(fn: Callable[[str, Leaf], Leaf], tree: Tree) -> Tree:
    """Maps `fn(path, leaf)` over the leaves that `leaves_by_path` lists."""
    return map_by_keys(lambda keys, leaf: fn(path_string(keys), leaf), tree)


def nested(by_path: Mapping[str, Leaf]) -> dict:
    """Returns a nested dict with each leaf at its path."""
    return _nested((path.split("/"), leaf) for path, leaf in by_path.items())


def nested_by_keys(by_keys: Mapping[KeyPath, Leaf]) -> Tree:
    """Returns a nested dict with each leaf under the names of its keys."""
    # If there is an empty key path, the tree is itself a leaf.
    if () in by_keys:
        return by_keys[()]
    return _nested((map(_key_name, keys), leaf) for keys, leaf in by_keys.items())


def _key_name(key: object) -> str:
    # A string key is not split at its slashes: Haiku's `"linear/~/w"` is a single key.
    name = getattr(key, "key", None)
    return name if isinstance(name, str) else path_string((key,))


def _nested(items: Iterable[tuple[Iterable[str], Leaf]]) -> dict:
    tree: dict = {}
    for names, leaf in items:
        *parents, name = names
        node = tree  # descends to the dict that gets the leaf
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def raise_if_any(
    title: str,
    problems: Sequence[str] | Mapping[str, str | None],
    error: type[Exception] = ValueError,
) -> None:
    """Raises an error that lists all problems that are not None, if there are any."""
    if isinstance(problems, Mapping):
        items = sorted(problems.items())
        problems = [f"{path}: {reason}" for path, reason in items if reason is not None]
    if problems:
        listing = "\n  ".join(problems)
        raise error(f"{title}:\n  {listing}")


def fused_with(name: str) -> list[str]:
    """Returns the names of the weights that servers fuse with this one, and its own."""
    # Inference servers compute q, k and v in one product, and gate and up in another.
    # The parts of names are separated by dots in Hugging Face, and by slashes in paths.
    for modules in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        pattern = rf"\b({'|'.join(modules)})(?=[./])"
        if re.search(pattern, name):
            return [re.sub(pattern, module, name) for module in modules]
    return [name]
