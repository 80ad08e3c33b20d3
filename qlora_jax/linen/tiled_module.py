"""Runs a linen module on one tile of tokens at a time."""

from collections.abc import Callable, Iterable

import flax.linen as nn
from jaxtyping import Array, Float

from ..memory.by_tiles import by_tiles
from ..trees.paths import raise_if_any
from .boxes import KernelBox, boxes_inside, has_dropout_stream


def tiled(module: nn.Module, tile: int | None) -> Callable[..., Array]:
    """Returns a function that runs a module on at most `tile` tokens at a time.

    Like `qlora_jax.memory.tiled`, for a linen module inside another module. Packed
    kernels and adapters are moved and gathered once for all tiles. Dropout draws a mask
    for each tile, in adapters too. Parameters have the same names as without tiles.

    Args:
        module: A module inside a compact method, or made in `setup`. It maps an array
            `[..., T, D]` to an array `[..., T, D2]`, treats all tokens independently
            and in the same way, and changes no variable.
        tile: The largest number of tokens of each sequence in a tile; None for all.

    Raises:
        ValueError: If `tile` is not a positive integer, or, when the function is
            called, if adapters inside have dropout and no stream of keys reaches the
            module (`split_rngs`), since all tiles would drop the same entries.

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

    def boxes(module: nn.Module) -> Iterable[KernelBox]:
        return boxes_inside(module, KernelBox).values()

    def run_tile(module: nn.Module, carry: None, tokens: Array) -> tuple[None, Array]:
        if not has_dropout_stream(module):
            raise_if_any(
                "these adapters must have no dropout in tiles of tokens, since all "
                "tiles would drop the same entries without a 'dropout' stream",
                [f"{box.path}: {box.dropout}" for box in boxes(module) if box.dropout],
            )
        return carry, module(tokens)

    def scan(module: nn.Module, tiles: Float[Array, "tiles ..."]) -> Array:
        # While `init` creates parameters, all tiles need the same key, because they use
        # the same parameters. Later, `nn.Dropout` uses this key if it has no other.
        is_split = {"params": not module.is_initializing(), nn.DenyList("params"): True}
        # Gradients of the parameters are summed over the steps of the scan, and the
        # activations of a tile are computed again in the backward pass.
        run = nn.scan(
            nn.remat(run_tile, prevent_cse=False),
            variable_broadcast=True,  # all tiles use the same parameters
            split_rngs=is_split,
        )
        return run(module, None, tiles)[1]

    def fetch_and_scan(module: nn.Module, tiles: Float[Array, "tiles ..."]) -> Array:
        # These boxes are copies that `nn.remat` made, so the originals do not change.
        for box in boxes(module):
            box.fetch(tiles[0])
        return scan(module, tiles)

    def run_tiles(tiles: Float[Array, "tiles ..."]) -> Array:
        if any(box.needs_fetch(tiles[0]) for box in boxes(module)):
            # The backward pass fetches kernels again, instead of keeping them.
            return nn.remat(fetch_and_scan, prevent_cse=False)(module, tiles)
        return scan(module, tiles)

    # With a single tile, `module` is called directly.
    return by_tiles(module, run_tiles, tile)
