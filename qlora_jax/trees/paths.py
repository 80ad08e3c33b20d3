"""Parameter trees by path.

A *kernel* is a float array, `QTensor`, `StraightThrough` or `AdaptedKernel` at a
target. Functions open boxes, such as Flax's `nn.Partitioned`, and box their results.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from .._jax.pytree import is_box, is_tree_leaf, rebox, unbox

Tree = Any


def _is_leaf(node: Any) -> bool:
    return is_tree_leaf(node) or is_box(node)


def path_string(keys: tuple) -> str:
    """Returns a key path as patterns see it: `"layers/0/q_proj/kernel"`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def paths_where(is_found: Callable[[Any], Any], tree: Tree) -> list[str]:
    """Returns the paths of the arrays of which `is_found` is true."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [path_string(keys) for keys, x in flat if is_found(x)]


def boxed_by_keys(tree: Tree) -> dict[tuple, Any]:
    """Returns the tree's leaves by key path; kernels, adapters and boxes are leaves."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_leaf))


def boxed_by_path(tree: Tree) -> dict[str, Any]:
    """As `boxed_by_keys`, by path."""
    return {path_string(keys): leaf for keys, leaf in boxed_by_keys(tree).items()}


def leaves_by_keys(tree: Tree) -> dict[tuple, Any]:
    """Returns the tree's leaves by key path, without boxes."""
    return {keys: unbox(leaf) for keys, leaf in boxed_by_keys(tree).items()}


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a tree by path, as patterns and rules see them.

    Args:
        tree: A base, lora or combined tree. Its kernels and adapters are leaves. Boxes,
            such as `nn.Partitioned`, are opened.

    Raises:
        ValueError: If paths are spelled alike, as those of `{"a/b": x, "a": {"b": y}}`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 8)))}}
        >>> list(ql.leaves_by_path(base))
        ['up/kernel']
    """
    by_keys = leaves_by_keys(tree)
    leaves = {path_string(keys): leaf for keys, leaf in by_keys.items()}
    if len(leaves) < len(by_keys):
        _refuse_alike(by_keys)
    return leaves


def _refuse_alike(by_keys: Iterable[tuple]) -> None:
    found: dict[str, list[str]] = {}
    for keys in by_keys:
        found.setdefault(path_string(keys), []).append(jax.tree_util.keystr(keys))
    alike = [
        f"{path}: {' and '.join(places)}"
        for path, places in found.items()
        if len(places) > 1
    ]
    refuse_listed("paths must differ. These are spelled alike; rename a key", alike)


def map_by_keys(fn: Callable[[tuple, Any], Any], tree: Tree) -> Tree:
    """Maps `fn(keys, leaf)` over leaves; a box stays unless `fn` returns a box."""
    one = lambda keys, leaf: rebox(leaf, fn(keys, unbox(leaf)))
    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_leaf)


def map_by_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Maps `fn(path, leaf)` over the leaves that `leaves_by_path` lists."""
    return map_by_keys(lambda keys, leaf: fn(path_string(keys), leaf), tree)


def nested(by_path: Mapping[str, Any]) -> dict:
    """Returns a nested dict with each leaf at its path."""
    return _nested((path.split("/"), leaf) for path, leaf in by_path.items())


def nested_by_keys(by_keys: Mapping[tuple, Any]) -> Any:
    """Returns a nested dict with each leaf under the names of its keys."""
    if () in by_keys:  # a leaf that is the entire tree
        return by_keys[()]
    return _nested((map(_name, keys), leaf) for keys, leaf in by_keys.items())


def _name(key: Any) -> str:
    # Text stays what it is: Haiku's `"linear/~/w"` is one key.
    text = getattr(key, "key", None)
    return text if isinstance(text, str) else path_string((key,))


def _nested(items: Iterable[tuple[Iterable[str], Any]]) -> dict:
    tree: dict = {}
    for names, leaf in items:
        *parents, name = names
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def refuse_listed(
    title: str,
    problems: Sequence[str] | Mapping[str, str | None],
    error: type[Exception] = ValueError,
) -> None:
    """Raises an error that lists all problems, perhaps by path, if there are any."""
    if isinstance(problems, Mapping):
        found = sorted(problems.items())
        problems = [f"{path}: {why}" for path, why in found if why is not None]
    if problems:
        listing = "\n  ".join(problems)
        raise error(f"{title}:\n  {listing}")


def fused_with(name: str) -> list[str]:
    """Returns the names of the weights that servers keep in one with this, and its own.

    They multiply q, k and v at once, and gate and up. Names have dots or slashes.
    """
    for modules in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        pattern = rf"\b({'|'.join(modules)})(?=[./])"
        if re.search(pattern, name):
            return [re.sub(pattern, module, name) for module in modules]
    return [name]
