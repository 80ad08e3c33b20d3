"""The product in tiles of columns, for CPUs: the decoded weights stay in cache.

Forward tiles run over N, the input gradient's over K, so that every tile is one plain
product and nothing is summed across tiles. They run in a loop: one tile is held at a
time, and one is compiled.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from ..quant.formats import get_format
from . import reference
from .reference import Weights

# Bytes of a decoded tile in float32: measured best of 1 to 16 MiB on two cores.
TILE_BYTES = 8 * 2**20


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
    k, n = weights.k, codes.shape[-1]
    size, unit = (k, weights.block_size) if transpose else (n, 1)
    tile = _tile(size, unit, 4 * math.prod(codes.shape[:-2]) * k * n)

    def of_tile(start, tile):
        part, part_scales, own = codes, scales, weights
        if tile == size:
            pass
        elif transpose:
            a_byte = 8 // get_format(weights.fmt).bits
            part = _cut(codes, start // a_byte, -(-tile // a_byte), -2)
            blocks = -(-tile // weights.block_size)
            part_scales = _cut(scales, start // weights.block_size, blocks, -2)
            own = dataclasses.replace(weights, k=tile)
        else:
            part = _cut(codes, start, tile, -1)
            part_scales = _cut(scales, start, tile, -1)
        return reference.product(
            x, part, part_scales, own, transpose=transpose, precision=precision
        )

    if tile == size:
        return of_tile(0, size)
    # XLA on CPUs has no updates of narrow floats: it would convert the whole result in
    # every turn of the loop. Integers it has.
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")

    def put(y, start, part):
        part = lax.bitcast_convert_type(part, bits)
        return lax.dynamic_update_slice_in_dim(y, part, start, y.ndim - 1)

    def step(i, y):
        return put(y, i * tile, of_tile(i * tile, tile))

    y = jnp.zeros((*x.shape[:-1], size), bits)
    y = lax.fori_loop(0, size // tile, step, y)
    if tail := size % tile:
        y = put(y, size - tail, of_tile(size - tail, tail))
    return lax.bitcast_convert_type(y, x.dtype)


def _tile(size, unit, weight_bytes):
    """Columns (or rows: a multiple of the unit) of a tile; they divide, if some do."""
    count = -(-weight_bytes // TILE_BYTES)
    if count <= 1 or size <= unit:
        return size
    for more in range(count, 2 * count):
        if size % (more * unit) == 0:
            return size // more
    return max(size // count // unit, 1) * unit


def _cut(a, start, size, axis):
    return lax.dynamic_slice_in_dim(a, start, size, a.ndim + axis)
