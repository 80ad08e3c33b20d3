"""Norms by the root mean square."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .config import DecoderConfig


class UnitOffsetRMSNorm(nn.Module):
    """Normalizes by the root mean square and multiplies by one plus `scale`.

    Attributes:
        epsilon: Added to the mean square.
        dtype: Dtype of the result; the computation is in float32.

    Example:
        >>> norm = UnitOffsetRMSNorm(epsilon=0)
        >>> norm.apply({"params": {"scale": jnp.ones(2)}}, jnp.array([[3.0, 3.0]]))
        Array([[2., 2.]], dtype=float32)
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Returns the normalized last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = jnp.expand_dims(1 + scale.astype(jnp.float32), range(x.ndim - 1))
        return (x / jnp.sqrt(mean_square + self.epsilon) * scale).astype(self.dtype)


def make_norm(config: DecoderConfig, dtype: Any, name: str) -> nn.Module:
    """Returns the norm that a decoder uses.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> make_norm(config, jnp.float32, "norm").epsilon
        1e-05
    """
    kind = UnitOffsetRMSNorm if config.unit_offset_norms else nn.RMSNorm
    return kind(epsilon=config.rms_norm_eps, dtype=dtype, name=name)
