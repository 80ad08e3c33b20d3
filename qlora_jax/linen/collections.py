"""Variable collections that a wrapped model takes and returns."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.scope import in_filter

from .._jax.pytree import is_box, is_tree_leaf, unbox
from ..adapters.base import AdaptedKernel, Adapter, dropout_keys, parts_of, sliced
from ..adapters.trained import Trained
from ..quant.kernel import as_kernel
from ..trees.paths import Tree, boxed_by_path, leaves_by_path, map_by_path, path_string
from .boxes import KernelBox


def check_collections(collections: Mapping) -> None:
    """Raises ValueError without "params", or with adapters in other collections."""
    if "params" not in collections:
        raise ValueError(
            "`variables` must have a collection 'params', the base tree. Got "
            f"{sorted(collections)}."
        )
    is_lora = lambda leaf: isinstance(leaf, Adapter)
    holds_lora = lambda tree: any(map(is_lora, leaves_by_path(tree).values()))
    others = sorted({*collections} - {"params"})
    if wrong := [name for name in others if holds_lora(collections[name])]:
        raise ValueError(
            "`variables` must have its adapters in the collection 'lora'. Got adapters "
            f"in {wrong}."
        )


def without_boxes(updates: Mapping, given: Mapping, mutable: Any) -> dict:
    """Returns the updated collections, with packed kernels as in `given`."""
    updates = dict(updates)
    if "params" in updates:
        own, lora = (
            boxed_by_path(given["params"]),
            leaves_by_path(given.get("lora", {})),
        )
        is_kernel = lambda path, x: (
            isinstance(x, KernelBox)
            or path in lora
            or is_tree_leaf(unbox(own.get(path)))
        )

        def back(keys: tuple, x: Any) -> Any:
            path = path_string(keys)
            return own[path] if is_kernel(path, x) else x

        # Not `map_by_path`: that would open the boxes that decode the kernels.
        updates["params"] = jax.tree_util.tree_map_with_path(
            back, updates["params"], is_leaf=is_box
        )
    if "lora" in given and in_filter(mutable, "lora"):
        updates["lora"] = given["lora"]
    return updates


def for_call(params: Tree, rngs: Any) -> Tree:
    """Returns parameters with adapters as scans slice them, and with dropout keys."""
    key, count = _dropout_key(rngs), 0

    def prepare(_: str, leaf: Any) -> Any:
        nonlocal count
        base, adapter, keys = parts_of(leaf)
        if adapter is None:
            return leaf
        if isinstance(adapter, Trained):
            return adapter.merged(as_kernel(base))
        if key is not None and adapter.dropout:
            count += 1
            keys = dropout_keys(adapter, jax.random.fold_in(key, count))
        return AdaptedKernel(base, sliced(adapter), keys)

    return map_by_path(prepare, params)


def _dropout_key(rngs: Any) -> Any:
    if rngs is None:
        return None
    rngs = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    key = rngs.get("dropout", rngs.get("params"))  # as flax's `make_rng`
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
