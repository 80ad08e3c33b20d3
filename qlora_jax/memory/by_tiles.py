"""Runs a function on one tile of tokens at a time."""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._jax.pytree import is_tree_leaf
from ..adapters.base import AdaptedKernel, constrained, parts_of
from ..product.sharded import find_gather, gathered
from ..quant.kernel import as_kernel


def tiled(fn: Callable[..., Any], tile: int | None) -> Callable[..., Any]:
    """Returns `fn`, computed on at most `tile` tokens of each sequence at a time.

    `fn` must treat each token in the same way and independently of the others, as an
    MLP or a norm does. The backward pass computes each tile again from its input, so
    only the intermediate values of one tile are in memory, whatever the length of the
    sequence. The values equal those of `fn`. The gradients of arrays that `fn` closes
    over are sums over tiles, so their last bits may differ.

    If `fn` is a pytree with packed kernels, such as an nnx module, its kernels are
    moved from host memory and gathered (FSDP) once for all tiles. Kernels that it
    closes over are moved and gathered again for each tile. To move them once, call
    `to_device` on them first.

    In linen, use `qlora_jax.linen.tiled`, because linen modules cannot run inside JAX's
    loops. An nnx module can, unless it changes a variable, as dropout does.

    Args:
        fn: A function from an array `[..., T, D]` to an array `[..., T, D2]`, where T
            are the tokens. Arrays that it closes over are differentiated too.
        tile: The largest number of tokens in a tile. Pass None to get `fn` itself.

    Raises:
        ValueError: If `tile` is not a positive integer. The returned function raises it
            if its argument has fewer than two axes.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> w = jnp.ones((8, 32)) / 8
        >>> mlp = lambda x: jax.nn.silu(x @ w) @ w.T
        >>> x = jax.random.normal(jax.random.key(0), (2, 100, 8))
        >>> bool(jnp.allclose(ql.memory.tiled(mlp, 16)(x), mlp(x), atol=1e-6))
        True
    """

    def run(fn: Callable, tiles: Array) -> Array:
        # In a loop, XLA cannot merge the recomputed values with the original ones, so
        # the barriers of `prevent_cse` are not needed.
        return lax.map(jax.checkpoint(fn, prevent_cse=False), tiles)

    def fetch_and_run(fn: PyTree, tiles: Array) -> Array:
        fetched = jax.tree.map(
            lambda node: fetch(node, tiles[0]), fn, is_leaf=is_tree_leaf
        )
        return run(fetched, tiles)

    def run_tiles(tiles: Array) -> Array:
        nodes = jax.tree.leaves(fn, is_leaf=is_tree_leaf)
        if any(needs_fetch(node, tiles[0]) for node in nodes):
            # With the checkpoint, the backward pass fetches kernels again. Otherwise,
            # the fetched kernels would stay on the device until then.
            return jax.checkpoint(fetch_and_run, prevent_cse=False)(fn, tiles)
        return run(fn, tiles)

    return by_tiles(fn, run_tiles, tile)


def by_tiles(
    fn: Callable[..., Any], run_tiles: Callable[[Array], Array], tile: int | None
) -> Callable[..., Any]:
    """Returns a function that computes `fn` by `run_tiles` if x has several tiles."""
    if tile is None:
        return fn
    if not isinstance(tile, numbers.Integral) or tile < 1:
        raise ValueError(f"`tile` must be a positive integer or None. Got {tile!r}.")

    def call_by_tiles(x: Float[Array, "*batch T D"]) -> Any:
        if x.ndim < 2:
            raise ValueError(
                f"`x` must have shape [..., tokens, features]. Got {x.shape}."
            )
        num_tokens = x.shape[-2]
        num_tiles = -(-num_tokens // tile)
        if num_tiles < 2:
            return fn(x)
        return _join(run_tiles(_cut(x, num_tiles)), num_tokens)

    return call_by_tiles


def _cut(
    x: Float[Array, "*batch T D"], num_tiles: int
) -> Float[Array, "tiles *batch t D"]:
    # Tiles have equal sizes. Copies of the last token fill the last tile: unlike zeros,
    # they are values that `fn` is defined for.
    num_tokens = x.shape[-2]
    size = -(-num_tokens // num_tiles)
    if padding := num_tiles * size - num_tokens:
        widths = [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]
        x = jnp.pad(x, widths, mode="edge")
    x = x.reshape(*x.shape[:-2], num_tiles, size, x.shape[-1])
    return jnp.moveaxis(x, -3, 0)


def _join(x: Float[Array, "tiles *batch t D"], num_tokens: int) -> Float[Array, "..."]:
    """Inverts `_cut`, and drops the copies of the last token."""
    x = jnp.moveaxis(x, 0, -3)  # [*batch, tiles, t, D]
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :num_tokens, :]


# A loop over tiles would move and gather a kernel again for each tile. The next two
# functions do it once, before the loop.
def needs_fetch(node: PyTree, x: Float[Array, "*rows D"]) -> bool:
    """Whether a product with rows split like `x` would move or gather the kernel."""
    # Arrays and plain functions count as float kernels, which are not gathered.
    kernel = as_kernel(parts_of(node)[0])
    return kernel.memory == "host" or find_gather(kernel.take(), x) is not None


def fetch(node: PyTree, x: Float[Array, "*rows D"]) -> PyTree:
    """Returns a kernel on the device, perhaps gathered, and an adapter split to fit."""
    if not needs_fetch(node, x):
        return node
    kernel, lora, key = parts_of(node)
    # If the kernel is a layer of a stack, `take` copies the layer out of it.
    q = kernel.take().to_device()
    if (layout := find_gather(q, x)) is not None:
        q = gathered(q, layout)
    return q if lora is None else AdaptedKernel(q, constrained(lora, q, x), key)
