"""What products move between devices: gathers of packed weights, sums of results."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from .._jax.modes import is_manual
from .._jax.specs import Axes


def sum_over(
    part: Float[Array, "*rows n"], axes: Axes, dtype: Any
) -> Float[Array, "*rows n"]:
    """Returns the sum of the devices' parts over mesh axes, rounded once to `dtype`.

    Called inside a `shard_map`. Parts are float32 where `dtype` has 16 bits.
    """
    if not axes:
        return part.astype(dtype)
    # An all-reduce is a reduce-scatter and an all-gather. Only the first needs float32:
    # rounding between the two moves 1.5 times the bytes of an all-reduce in 16 bits,
    # where one in float32 would move twice as many. Rows that do not divide are few,
    # and in a partly manual program XLA may split them over other axes.
    ways = lax.axis_size(axes)
    divisible = [i for i, size in enumerate(part.shape[:-1]) if size % ways == 0]
    if part.dtype == dtype or not divisible or not is_manual():
        return lax.psum(part, axes).astype(dtype)
    rows = divisible[0]
    total = lax.psum_scatter(part, axes, scatter_dimension=rows, tiled=True)
    return lax.all_gather(total.astype(dtype), axes, axis=rows, tiled=True)


def gather(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: Axes,
    along: int,
) -> tuple[Array, Array]:
    """Gathers both along N (-1), K (-2) or experts (-3), in one all-gather of bytes."""
    *lead, rows, _ = codes.shape
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    # Along K, a device's codes and scales have to be told apart first.
    both = lax.all_gather(both, axes, axis=both.ndim + along, tiled=along != -2)
    lead = both.shape[: len(lead)]
    whole = lambda a: a.reshape(*lead, -1, both.shape[-1])
    return whole(both[..., :rows, :]), _scales_of(whole(both[..., rows:, :]))


def _bytes_of(scales: Array) -> Array:
    """Float32 `[..., s, n]` as uint8 `[..., 4 s, n]`."""
    *lead, s, n = scales.shape
    parts = lax.bitcast_convert_type(scales, jnp.uint8)
    return jnp.moveaxis(parts, -1, -2).reshape(*lead, 4 * s, n)


def _scales_of(parts: Array) -> Array:
    """Inverts `_bytes_of`."""
    *lead, s, n = parts.shape
    parts = jnp.moveaxis(parts.reshape(*lead, s // 4, 4, n), -2, -1)
    return lax.bitcast_convert_type(parts, jnp.float32)
