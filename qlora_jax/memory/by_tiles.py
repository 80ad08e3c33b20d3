"""Runs a function of tokens on one tile at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._jax.pytree import is_tree_leaf
from .fetch import fetch, needs_fetch


def tiled(fn: Callable[..., Any], tile: int | None) -> Callable[..., Any]:
    """Returns `fn`, computed on at most `tile` tokens of each sequence at a time.

    `fn` computes each token alike and alone, as an MLP or a norm does. The backward
    pass computes a tile again from its input, so the intermediate values of one tile
    are held, whatever the length of the sequence. Values are those of `fn`; gradients
    of arrays that `fn` closes over are sums over tiles, so their last bits may differ.

    Where `fn` is a pytree with packed kernels, such as an nnx module, its kernels are
    moved from host memory, and gathered (FSDP), once for all tiles. For kernels that it
    closes over, call `to_device` before; they are gathered for each tile.

    In linen, use `qlora_jax.linen.tiled`: linen modules cannot run inside JAX's loops.
    An nnx module can if it changes no variable, as dropout does.

    Args:
        fn: A function of an array `[..., T, D]` to an array `[..., T, D2]`, T being the
            tokens. Arrays that it closes over are differentiated too.
        tile: The most tokens of a tile; None for `fn` itself.

    Raises:
        ValueError: If `tile` is not positive. The function raises it if its argument
            has less than two axes.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> w = jnp.ones((8, 32)) / 8
        >>> mlp = lambda x: jax.nn.silu(x @ w) @ w.T
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> bool(jnp.allclose(ql.memory.tiled(mlp, 16)(x), mlp(x), atol=1e-6))
        True
    """

    # Inside a loop nothing merges the computation with its repetition.
    def run(fn: Any, parts: Any) -> Any:
        return lax.map(jax.checkpoint(fn, prevent_cse=False), parts)

    def fetch_and_run(fn: Any, parts: Any) -> Any:
        one = lambda node: fetch(node, parts[0])
        return run(jax.tree.map(one, fn, is_leaf=is_tree_leaf), parts)

    def run_tiles(parts: Any) -> Any:
        nodes = jax.tree.leaves(fn, is_leaf=is_tree_leaf)
        if any(needs_fetch(node, parts[0]) for node in nodes):
            # Once for all tiles, and not kept for the backward pass.
            return jax.checkpoint(fetch_and_run, prevent_cse=False)(fn, parts)
        return run(fn, parts)

    return by_tiles(fn, run_tiles, tile)


def by_tiles(
    fn: Callable[..., Any], run_tiles: Callable[..., Any], tile: int | None
) -> Callable[..., Any]:
    """Returns `fn(x)`, by `run_tiles(tiles)` where x has several tiles of tokens."""
    if tile is None:
        return fn
    if tile < 1:
        raise ValueError(f"`tile` must be positive or None. Got {tile}.")

    def in_tiles(x: Float[Array, "*batch T D"]) -> Any:
        if x.ndim < 2:
            raise ValueError(
                f"`x` must have an axis of tokens and one of features. Got {x.shape}."
            )
        tokens = x.shape[-2]
        count = -(-tokens // tile)
        return fn(x) if count < 2 else _join(run_tiles(_cut(x, count)), tokens)

    return in_tiles


def _cut(x: Float[Array, "*batch T D"], count: int) -> Float[Array, "tiles *batch t D"]:
    """Returns tiles of one size; the last token is repeated to fill the last tile."""
    tokens = x.shape[-2]
    size = -(-tokens // count)
    if rest := count * size - tokens:
        widths = [(0, 0)] * (x.ndim - 2) + [(0, rest), (0, 0)]
        x = jnp.pad(x, widths, mode="edge")
    x = x.reshape(*x.shape[:-2], count, size, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)


def _join(x: Float[Array, "tiles *batch t D"], tokens: int) -> Float[Array, "..."]:
    """Inverts `_cut`, without the repeated tokens."""
    x = jnp.moveaxis(x, 0, -3)
    x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
    return x[..., :tokens, :]
