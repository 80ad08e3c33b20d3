"""Rotary positions (RoPE, arXiv:2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import Rope


def rotary_table(
    positions: Int[Array, "B T"],
    rope: Rope | None,
    dim: int,
    lengths: Int[Array, "B _"] | int | None = None,
) -> Float[Array, "2 B T 1 dim/2"]:
    """Returns cosine and sine of each pair's angle; None turns nothing.

    Only `rope.long_divisors` need `lengths`, the tokens of each token's sequence.
    """
    # Pair i turns by position * theta ** (-2 i / dim) / divisors[i].
    half = dim // 2
    if rope is None:
        angle = jnp.zeros((*positions.shape, 1, half), jnp.float32)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    frequency = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency = frequency[None, None, None]
    plain = frequency / _row(rope.divisors) if rope.divisors else frequency
    if rope.long_divisors:
        long = frequency / _row(rope.long_divisors)
        is_long = jnp.asarray(lengths) > rope.original_length
        is_long = jnp.broadcast_to(is_long, positions.shape)[:, :, None, None]
        plain = jnp.where(is_long, long, plain)
    angle = positions[:, :, None, None].astype(jnp.float32) * plain
    table = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return table if rope.scale == 1 else table * rope.scale


def _row(divisors: tuple[float, ...]) -> Float[Array, "1 1 1 n"]:
    return jnp.asarray(divisors, jnp.float32)[None, None, None]


def rotate(
    x: Float[Array, "B T H Dh"], table: Float[Array, "2 B T 1 half"]
) -> Float[Array, "B T H Dh"]:
    """Turns the pairs (i, i + half) of each head; later values stay."""
    cos, sin = table
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    low, high = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    # Cast first: XLA on CPUs concatenates in memory.
    halves = low * cos - high * sin, high * cos + low * sin
    turned = jnp.concatenate([half.astype(x.dtype) for half in halves], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
