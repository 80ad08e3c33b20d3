"""A mixture of experts: a router, and an MLP for each expert.

Rows of tokens are sorted by expert and multiplied in groups, each by its expert's
kernel; none is dropped. Shapes: M tokens, C experts of each, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int

from .config import DecoderConfig, Experts
from .products import gated, keep, make_dense


class ExpertsDense(nn.Module):
    """A linear layer for each expert, of rows that are sorted by expert."""

    experts: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Returns the product of each group of rows with its expert's kernel."""
        draw = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = self.experts, x.shape[-1], self.features
        kernel = self.param("kernel", draw, shape).astype(self.dtype)
        y = lax.ragged_dot(x, kernel, group_sizes, preferred_element_type=jnp.float32)
        return y.astype(x.dtype)


class ExpertMLPs(nn.Module):
    """The gated MLPs of all experts."""

    config: DecoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Returns the outputs of rows that are sorted by expert."""
        c = self.config
        assert c.experts is not None
        count = c.experts.count
        dense = lambda width, name: ExpertsDense(count, width, self.dtype, name=name)
        gate = keep(dense(c.intermediate_size, "gate_proj")(x, group_sizes))
        up = keep(dense(c.intermediate_size, "up_proj")(x, group_sizes))
        return dense(c.hidden_size, "down_proj")(gated(c, gate, up), group_sizes)


class MixtureOfExperts(nn.Module):
    """The weighted sum of each token's experts."""

    config: DecoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Returns the block's output, without the residual."""
        c = self.config
        assert c.experts is not None
        rows = x.reshape(-1, x.shape[-1])
        router = make_dense(c.experts.count, c.mlp_bias, self.dtype, "router")
        weights, chosen = choose_experts(router(rows[None])[0], c.experts)
        # A row for each pair of a token and an expert of it, sorted by expert.
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=c.experts.count)
        mlps = ExpertMLPs(c, self.dtype, name="experts")
        y = mlps(rows[order // c.experts.per_token], sizes.astype(jnp.int32))
        y = keep(y[jnp.argsort(order)]).reshape(*chosen.shape, -1)
        mixed = jnp.einsum("mcd,mc->md", y.astype(jnp.float32), weights)
        return mixed.astype(x.dtype).reshape(x.shape)


def choose_experts(
    logits: Float[Array, "M E"], experts: Experts
) -> tuple[Float[Array, "M C"], Int[Array, "M C"]]:
    """Returns the experts of each token and their weights.

    The softmax is over all experts, or over the chosen ones if they are normalized.
    """
    logits = logits.astype(jnp.float32)
    largest, chosen = lax.top_k(logits, experts.per_token)
    if experts.normalized:
        return jax.nn.softmax(largest, axis=-1), chosen
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(largest - total), chosen
