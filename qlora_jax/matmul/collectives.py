"""Gathers of packed weights: codes and scales in one all-gather of bytes."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8

from .._jax.specs import Axes


def gather_columns(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: Axes,
) -> tuple[Array, Array]:
    """Gathers both along N, in one all-gather of bytes."""
    rows = codes.shape[-2]
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 1, tiled=True)
    return both[..., :rows, :], _scales_of(both[..., rows:, :])


def gather_rows(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: Axes,
) -> tuple[Array, Array]:
    """Gathers both along K, in one all-gather of bytes."""
    *lead, rows, n = codes.shape
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 2)
    whole = lambda a: a.reshape(*lead, -1, n)
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
