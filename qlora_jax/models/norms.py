"""Norms by the root mean square."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from .config import DecoderConfig


class UnitOffsetRMSNorm(nn.Module):
    """Root-mean-square norm times `1 + scale`, computed in float32."""

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
    """Returns the norm that a decoder uses."""
    kind = UnitOffsetRMSNorm if config.unit_offset_norms else nn.RMSNorm
    return kind(epsilon=config.rms_norm_eps, dtype=dtype, name=name)
