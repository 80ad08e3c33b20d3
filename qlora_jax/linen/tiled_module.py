"""Runs a linen module on one tile of tokens at a time."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from ..memory.by_tiles import by_tiles
from ..trees.paths import refuse_listed
from .boxes import KernelBox


def tiled(module: nn.Module, tile: int | None) -> Callable[..., Any]:
    """Returns a module's call, on at most `tile` tokens of each sequence at a time.

    As `qlora_jax.memory.tiled`, for a linen module that is called inside another one.
    Packed kernels and adapters are moved and gathered once for all tiles; modules such
    as `nn.Dropout` get a key for each tile. Parameters are those of the module alone.

    Args:
        module: A module inside a compact method, or made in `setup`. It maps an array
            `[..., T, D]` to an array `[..., T, D2]`, treats each token alike and alone,
            and changes no variable.
        tile: The most tokens of a tile; None for all at once.

    Raises:
        ValueError: If `tile` is not positive. The function raises it if adapters inside
            have dropout: all tiles would drop the same entries.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> class Model(nn.Module):
        ...     tile: int | None = None
        ...
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return x + ql.linen.tiled(nn.Dense(8, name="mlp"), self.tile)(x)
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> variables = Model().init(jax.random.key(1), x)
        >>> got = Model(tile=16).apply(variables, x)
        >>> bool(jnp.allclose(got, Model().apply(variables, x), atol=1e-6))
        True
    """

    def call(module: nn.Module, carry: None, part: Any) -> tuple[None, Any]:
        _refuse_dropout(module)
        return carry, module(part)

    scan = nn.scan(
        nn.remat(call, prevent_cse=False),
        variable_broadcast=True,
        split_rngs={"params": False, "dropout": True},
    )

    def run(module: nn.Module, parts: Any) -> Any:
        for box in _boxes(module):
            box.fetch(parts[0])
        return scan(module, None, parts)[1]

    def run_tiles(parts: Any) -> Any:
        if any(box.needs_fetch(parts[0]) for box in _boxes(module)):
            # Once for all tiles, and not kept for the backward pass.
            return nn.remat(run, prevent_cse=False)(module, parts)
        return run(module, parts)

    return by_tiles(module, run_tiles, tile)


def _boxes(module: nn.Module) -> list[KernelBox]:
    is_box = lambda node: isinstance(node, KernelBox)
    leaves = jax.tree.leaves(module.variables.get("params", {}), is_leaf=is_box)
    return [leaf for leaf in leaves if is_box(leaf)]


def _refuse_dropout(module: nn.Module) -> None:
    refuse_listed(
        "these adapters must have no dropout in tiles of tokens, which would all drop "
        "the same entries",
        [f"{box.path}: {box.dropout}" for box in _boxes(module) if box.dropout],
    )
