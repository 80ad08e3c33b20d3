"""Matches the adapters of a lora tree with the kernels of a base tree."""

from collections.abc import Mapping
from typing import Any

from .._jax.pytree import is_tree_leaf
from ..adapters.base import KINDS, AdaptedKernel, Adapter, why_not
from ..adapters.trained import Trained
from .paths import Tree, leaves_by_keys, leaves_by_path, map_by_path, refuse_listed

CODES = frozenset({"codes", "scales"})


def adapters_by_path(base: Tree, lora: Tree) -> dict[str, Adapter]:
    """Returns the adapters by path, after checking that each fits its kernel."""
    kernels = leaves_by_path(base)
    combined = [p for p, x in kernels.items() if isinstance(x, AdaptedKernel)]
    if combined:
        raise TypeError(
            "`base` must not hold adapters: `split` a combined tree first. Got some "
            f"at {combined}."
        )
    check_structure(kernels)
    adapters = adapters_of(lora)
    if bad := [path for path in adapters if path not in kernels]:
        raise ValueError(
            "every adapter must be at the path of a kernel of `base`. Got others at "
            f"{bad}."
        )
    problems = {path: why_not(x, kernels[path]) for path, x in adapters.items()}
    refuse_listed("these adapters do not fit their kernels", problems)
    return adapters


def adapters_of_each(base: Tree, lora: Tree) -> dict[str, Adapter]:
    """As `adapters_by_path`, with copies of what experts share."""
    kernels = leaves_by_path(base)
    adapters = adapters_by_path(base, lora).items()
    return {path: adapter.unshared(kernels[path]) for path, adapter in adapters}


def adapters_of(lora: Tree) -> dict[str, Adapter]:
    """Returns the adapters of a lora tree by path; refuses other leaves."""
    leaves = leaves_by_path(lora)
    for kind in KINDS.values():
        check_structure(leaves, frozenset(kind.roles))
    if bad := [path for path, x in leaves.items() if not isinstance(x, Adapter)]:
        raise ValueError(
            f"every leaf of `lora` must be an adapter. Got others at {bad}."
        )
    return leaves


def adapters_by_keys(lora: Tree) -> dict[tuple, Adapter]:
    """As `adapters_of`, by key path."""
    adapters_of(lora)
    return leaves_by_keys(lora)


def with_trained(base: Tree, adapters: Mapping[str, Adapter]) -> Tree:
    """Returns the base tree with leaves that are trained in full in their places."""

    def one(path: str, leaf: Any) -> Any:
        adapter = adapters.get(path)
        return adapter.value if isinstance(adapter, Trained) else leaf

    return map_by_path(one, base)


def check_structure(leaves: Mapping[str, Any], names: frozenset[str] = CODES) -> None:
    """Raises ValueError where a kernel or adapter became a dict of its arrays."""
    parents: dict[str, set[str]] = {}
    for path, leaf in leaves.items():
        if not is_tree_leaf(leaf):
            parent, _, name = path.rpartition("/")
            parents.setdefault(parent, set()).add(name)
    lost = [
        f"{parent}: an array for each of {sorted(found)}"
        for parent, found in parents.items()
        if names <= found
    ]
    refuse_listed(
        "a tree was restored without its structure. Restore it into the tree of shapes "
        "that jax.eval_shape(lambda: ql.init(key, params, config)) returns, or build "
        "each kernel with ql.QTensor.from_parts. Got",
        lost,
    )
