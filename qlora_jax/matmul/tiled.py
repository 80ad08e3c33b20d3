"""The product in tiles of columns, for CPUs: the decoded weights stay in cache.

Forward tiles run over N, the input gradient's over K, so that every tile is one plain
product and nothing is summed across tiles. They run in a loop: one tile is held at a
time, and one is compiled. Values are looked up by selects there and by a gather where
there is no loop: measured, a gather is as fast but in loops, and it compiles faster.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from ..quant.blockwise import gather_values, select_values
from ..quant.formats import get_format
from ..quant.packing import choose_nibbles
from .reference import Weights, decode, dot

# Bytes of a decoded tile in float32: measured best of 1 to 16 MiB on two cores.
TILE_BYTES = 4 * 2**20
# A product packs its left operand anew for every tile: in narrower ones that is felt.
NARROWEST = 256


def product(
    x: Float[Array, "*batch m contracted"],
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    weights: Weights,
    *,
    transpose: bool = False,
    precision: Any = None,
) -> Float[Array, "*batch m outputs"]:
    """Equals `reference.product`, holding one decoded tile at a time."""
    if x.shape[-2] == 1:
        # XLA multiplies a single row by a routine of its own, which on some versions is
        # several times slower in bfloat16 than what it takes for two.
        both = jnp.concatenate([x, jnp.zeros_like(x)], axis=-2)
        settings = {"transpose": transpose, "precision": precision}
        return product(both, codes, scales, weights, **settings)[..., :1, :]
    k, n = weights.k, codes.shape[-1]
    size, unit = (k, weights.block_size) if transpose else (n, 1)
    tile = _tile(size, unit, 4 * math.prod(codes.shape[:-2]) * k * n)

    def multiply(codes, scales, k, look_up):
        w = decode(codes, scales, weights, k, x.dtype, look_up)
        return dot(x, w, transpose=transpose, precision=precision).astype(x.dtype)

    if tile == size:
        return multiply(codes, scales, k, gather_values)

    look_up = functools.partial(select_values, unpack=choose_nibbles)

    def of_tile(start, tile):
        if transpose:
            a_byte = 8 // get_format(weights.fmt).bits
            part = _cut(codes, start // a_byte, -(-tile // a_byte), -2)
            blocks = -(-tile // weights.block_size)
            part_scales = _cut(scales, start // weights.block_size, blocks, -2)
            return multiply(part, part_scales, tile, look_up)
        part = _cut(codes, start, tile, -1)
        return multiply(part, _cut(scales, start, tile, -1), k, look_up)

    def step(i, y):
        return lax.dynamic_update_index_in_dim(
            y, of_tile(i * tile, tile), i, y.ndim - 2
        )

    # Tiles have an axis of their own: where they are columns of a matrix, XLA on CPUs
    # converts the whole result in every turn on some versions, if it is narrow.
    rows = x.shape[:-1]
    count, rest = divmod(size, tile)
    y = lax.fori_loop(0, count, step, jnp.zeros((*rows, count, tile), x.dtype))
    y = y.reshape(*rows, count * tile)
    if rest:
        y = jnp.concatenate([y, of_tile(size - rest, rest)], axis=-1)
    return y


def _tile(size, unit, weight_bytes):
    """Columns (or rows: a multiple of the unit) of a tile; they divide, if some do."""
    count = min(-(-weight_bytes // TILE_BYTES), size // max(NARROWEST, unit))
    if count <= 1:
        return size
    for fewer in range(count, count // 2, -1):
        if size % (fewer * unit) == 0:
            return size // fewer
    return size // count // unit * unit


def _cut(a, start, size, axis):
    return lax.dynamic_slice_in_dim(a, start, size, a.ndim + axis)
