"""The product in tiles of columns, for CPUs: the decoded weights stay in cache.

Forward tiles run over N, the input gradient's over K, so that every tile is one plain
product and nothing is summed across tiles. Tiles are unrolled, each tied to the one
before by an `optimization_barrier`, or XLA would decode all of them first.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from ..quant.formats import get_format
from .reference import Weights, decode, dot

TILE = 512


def product(
    x: Float[Array, "*batch m k"],
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    weights: Weights,
    *,
    transpose: bool = False,
    precision: Any = None,
) -> Float[Array, "*batch m n"]:
    """Equals `reference.product`, holding one decoded tile at a time."""
    size = weights.k if transpose else codes.shape[-1]
    tile = max(TILE, weights.block_size)
    outputs: list[Array] = []
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        part, part_scales = _slice(codes, scales, weights, start, stop, transpose)
        if outputs:
            part, outputs[-1] = lax.optimization_barrier((part, outputs[-1]))
        k = stop - start if transpose else weights.k
        w = decode(part, part_scales, weights, k, x.dtype)
        y = dot(x, w, transpose=transpose, precision=precision)
        outputs.append(y.astype(x.dtype))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=-1)


def _slice(codes, scales, weights, start, stop, transpose):
    """Rows (a multiple of the block) or columns from `start` to `stop`."""
    if not transpose:
        return codes[..., start:stop], scales[..., start:stop]
    per_byte = 8 // get_format(weights.fmt).bits
    rows = slice(start // per_byte, -(-stop // per_byte))
    blocks = slice(start // weights.block_size, -(-stop // weights.block_size))
    return codes[..., rows, :], scales[..., blocks, :]
