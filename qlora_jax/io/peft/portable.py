"""Gives adapters a form that servers cannot misread: one rank, and no scaling."""

import numpy as np

from ...adapters.base import Adapter, scaling_at
from ...adapters.config import is_table
from ...adapters.lora import LoRA
from ...trees.adapters import adapters_of_each
from ...trees.paths import Tree, nested, refuse_listed


def portable(base: Tree, lora: Tree) -> Tree:
    """Returns adapters of the same products in float32, of one rank and scaling 1.

    B holds the scaling, and zeros pad smaller ranks: servers that ignore patterns of
    ranks and alphas, or rsLoRA, compute the same.

    Args:
        base: The base tree, or its shapes.
        lora: The lora tree.

    Returns:
        The lora tree of these adapters, for `save_peft`.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If an adapter is not LoRA, or does not fit its kernel.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"up": jnp.ones((64, 8)), "down": jnp.ones((8, 64))}
        >>> ranks = {"rank": 4, "rank_pattern": {"down": 2}}
        >>> config = ql.QLoRAConfig(**ranks, alpha=8, fmt=None, targets=".*")
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> new = ql.io.portable(base, lora)
        >>> lora["down"].a.shape, lora["down"].scaling
        ((8, 2), 4.0)
        >>> new["down"].a.shape, new["down"].scaling
        ((8, 4), 1.0)
    """
    adapters = adapters_of_each(base, lora)
    kinds = {
        path: type(x).__name__ + " of a table" * is_table(path)
        for path, x in adapters.items()
    }
    refuse_listed(
        "adapters for servers must be LoRA: export others in the format merged. Got",
        {path: kind for path, kind in kinds.items() if kind != "LoRA"},
    )
    rank = max((x.rank for x in adapters.values()), default=0)
    return nested({path: _portable(x, rank) for path, x in adapters.items()})


def _portable(adapter: Adapter, rank: int) -> LoRA:
    batch, (a, b) = adapter.batch_shape, map(np.asarray, adapter.arrays.values())
    each = [scaling_at(adapter, index) for index in np.ndindex(*batch)]
    b = b.astype(np.float64) * np.reshape(each, (*batch, 1, 1))
    kept, more = [(0, 0)] * len(batch), (0, rank - adapter.rank)
    a, b = np.pad(a, [*kept, (0, 0), more]), np.pad(b, [*kept, more, (0, 0)])
    a, b = (x.astype(np.float32) for x in (a, b))
    return LoRA(a, b, 1.0, adapter.dropout, adapter.geometry)
