"""Blocks of 256 values in 8 bits, with their largest magnitude as scale.

A block is 256 columns of a row of a *grid* `[layers, rows, columns]`. Columns are the
longest axis that 256 divides, so that blocks do not cross devices that split it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.memory import is_concrete
from .._jax.modes import call_in_auto_mode, explicit_mesh, in_auto_mode
from .._jax.specs import fitting_spec, spec_of
from .dynamic_map import decode, dynamic_map, encode

BLOCK = 256
SMALLEST = 4096  # values of an array or a layer; smaller ones stay in float32
_WORD = 4  # codes of a word


class Blocks(NamedTuple):
    """An array in 8 bits; also the shapes or specs of its two arrays.

    Codes are uint32 `[layers, rows / 4, columns]`: byte `i`, from the lowest on, is the
    code of row `4 * row + i`. Scales are float32 `[layers, 4, rows * columns / 1024]`.
    """

    # Words of four rows: 32-bit arrays in a TPU's host memory are sliced layer by layer
    # without a copy of the stack; arrays of bytes are not.
    codes: Any
    # In the order of `[rows, columns / 256]`, whose last axis TPUs would pad to 128.
    scales: Any


class Grid(NamedTuple):
    """View of an array: rows are a multiple of 4, columns of 256."""

    layers: int
    rows: int
    columns: int
    axis: int | None  # the array's axis that is the columns; None if flattened


def grid_of(shape: tuple[int, ...]) -> Grid | None:
    """Returns the grid of an array; None for one that stays in float32."""
    start = 1 if len(shape) > 2 else 0
    layers, size = math.prod(shape[:start]), math.prod(shape[start:])
    if size < SMALLEST:
        return None
    for axis in sorted(range(start, len(shape)), key=lambda i: -shape[i]):
        columns = shape[axis]
        if columns % BLOCK == 0 and size // columns % _WORD == 0:
            return Grid(layers, size // columns, columns, axis)
    return Grid(layers, _WORD, BLOCK * -(-size // (_WORD * BLOCK)), None)


def zero_blocks(like: Any, signed: bool) -> Any:
    """Returns zeros for an array, with its sharding; float32 if it has no grid."""
    grid = grid_of(like.shape)
    if grid is None:
        return jnp.zeros_like(like, jnp.float32)
    shapes = block_shapes(grid)
    word = dynamic_map(signed).zero * 0x01010101
    codes = jnp.full(shapes.codes, np.uint32(word), jnp.uint32)
    scales = jnp.zeros(shapes.scales, jnp.float32)
    mesh, put = explicit_mesh(like), jax.sharding.reshard
    sharding = getattr(like, "sharding", None) if is_concrete(like) else None
    if mesh is not None:
        spec = spec_of(like)
    elif isinstance(sharding, NamedSharding):
        mesh, put, spec = sharding.mesh, jax.device_put, sharding.spec
        spec = (*spec, *[None] * (like.ndim - len(spec)))
    else:
        return Blocks(codes, scales)
    specs = _block_specs(mesh, spec, grid)
    split = lambda x, spec: put(x, NamedSharding(mesh, spec))
    return jax.tree.map(split, Blocks(codes, scales), specs)


def from_blocks(blocks: Any, like: jax.Array, signed: bool) -> jax.Array:
    """Returns float32 values in the shape and with the sharding of an array."""
    grid = grid_of(like.shape)
    if grid is None:
        return blocks
    run = lambda blocks: _from_grid(_decode_grid(blocks, signed), like.shape, grid)
    mesh = explicit_mesh(like, blocks)
    if mesh is None:
        return run(blocks)
    return in_auto_mode(run, mesh, PartitionSpec(*spec_of(like)))(blocks)


def to_blocks(x: jax.Array, signed: bool) -> Any:
    """Rounds float32 values to 8 bits. NaN or infinity makes the block NaN."""
    grid = grid_of(x.shape)
    if grid is None:
        return x
    run = lambda x: _encode_grid(_to_grid(x, grid), signed)
    specs = lambda mesh: _block_specs(mesh, spec_of(x), grid)
    return call_in_auto_mode(run, specs, x)


def block_shapes(grid: Grid) -> Any:
    """Returns the shapes of codes and scales."""
    layers, rows, columns, _ = grid
    scales = rows * columns // BLOCK
    return Blocks((layers, rows // _WORD, columns), (layers, 4, scales // 4))


def _block_specs(mesh: Any, spec: tuple, grid: Grid) -> Any:
    """Returns the specs of both arrays for an array split as `spec` says."""
    start = 1 if len(spec) > 2 else 0
    layers = spec[0] if len(spec) > 2 else None
    others = [i for i in range(start, len(spec)) if i != grid.axis]
    rows = spec[others[0]] if others else None
    if grid.axis is None:  # There are only four rows.
        rows, columns = None, rows
    else:
        columns = spec[grid.axis]
    shapes = block_shapes(grid)
    return Blocks(
        fitting_spec(mesh, (layers, rows, columns), shapes.codes),
        fitting_spec(mesh, (layers, None, None), shapes.scales),
    )


def _to_grid(x: jax.Array, grid: Grid) -> jax.Array:
    layers, rows, columns, axis = grid
    if axis is not None:
        return jnp.moveaxis(x, axis, -1).reshape(layers, rows, columns)
    flat = x.reshape(layers, x.size // layers)
    missing = rows * columns - flat.shape[1]
    return jnp.pad(flat, ((0, 0), (0, missing))).reshape(layers, rows, columns)


def _from_grid(x: jax.Array, shape: tuple[int, ...], grid: Grid) -> jax.Array:
    layers, rows, columns, axis = grid
    if axis is not None:
        others = [size for i, size in enumerate(shape) if i != axis]
        return jnp.moveaxis(x.reshape(*others, columns), -1, axis)
    flat = x.reshape(layers, rows * columns)
    return flat[:, : math.prod(shape) // layers].reshape(shape)


def _encode_grid(x: jax.Array, signed: bool) -> Blocks:
    layers, rows, columns = x.shape
    x = x.reshape(layers, rows, columns // BLOCK, BLOCK)
    # The bits of magnitudes are ordered as the magnitudes are, and NaN is the largest.
    # A maximum of floats may drop a NaN on CPUs.
    bits = lax.bitcast_convert_type(lax.abs(x), jnp.int32)
    scales = lax.bitcast_convert_type(bits.max(-1), jnp.float32)
    is_usable = jnp.isfinite(scales) & (scales > 0)
    divisor = jnp.where(is_usable, scales, 1.0)[..., None]
    shares = jnp.where(is_usable[..., None], x / divisor, 0.0)
    if not signed:  # A quotient may underflow to zero; a positive value is no zero.
        least = jnp.where(bits > 0, jnp.finfo(jnp.float32).tiny, 0.0)
        shares = jnp.maximum(shares, least)
    codes = encode(shares, signed).reshape(layers, rows, columns)
    words = codes[:, ::_WORD]
    for i in range(1, _WORD):
        words = words | (codes[:, i::_WORD] << (8 * i))
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    return Blocks(words, scales.reshape(layers, 4, -1))


def _decode_grid(blocks: Blocks, signed: bool) -> jax.Array:
    words, scales = blocks
    layers, quarter, columns = words.shape
    rows = quarter * _WORD
    words = words[:, :, None]
    codes = jnp.concatenate([(words >> (8 * i)) & 0xFF for i in range(_WORD)], 2)
    values = decode(codes, signed)
    values = values.reshape(layers, rows, columns // BLOCK, BLOCK)
    values = values * scales.reshape(layers, rows, columns // BLOCK, 1)
    return values.reshape(layers, rows, columns)
