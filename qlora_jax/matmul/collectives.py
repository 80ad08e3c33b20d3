"""Gathers of packed weights: codes and scales in one all-gather of bytes."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8

from .._jax.specs import Axes


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
