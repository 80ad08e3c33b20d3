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
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Returns the product of each group of rows with its expert's kernel."""
        draw = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = self.experts, x.shape[-1], self.features
        kernel = self.param("kernel", draw, shape).astype(self.dtype)
        y = lax.ragged_dot(x, kernel, group_sizes, preferred_element_type=jnp.float32)
        if self.use_bias:
            shape = self.experts, self.features
            bias = self.param("bias", nn.initializers.zeros, shape)
            of_row = jnp.repeat(
                jnp.arange(self.experts), group_sizes, total_repeat_length=len(x)
            )
            y = y + bias.astype(jnp.float32)[of_row]
        return y.astype(x.dtype)


class ExpertMLPs(nn.Module):
    """The gated MLPs of all experts."""

    config: DecoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, group_sizes):
        """Returns the outputs of rows that are sorted by expert."""
        c, experts = self.config, self.config.experts
        assert experts is not None

        def dense(x, width, name):
            kind = ExpertsDense(experts.count, width, c.mlp_bias, self.dtype, name=name)
            return kind(x, group_sizes)

        if experts.interleaved:
            both = keep(dense(x, 2 * c.intermediate_size, "gate_up_proj"))
            gate, up = by_turns(both)
        else:
            gate = keep(dense(x, c.intermediate_size, "gate_proj"))
            up = keep(dense(x, c.intermediate_size, "up_proj"))
        return dense(gated(c, gate, up), c.hidden_size, "down_proj")


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
        logits = router(rows[None])[0]
        self.sow("router", "logits", logits)  # where that collection is mutable
        weights, chosen = choose_experts(logits, c.experts)
        # A row for each pair of a token and an expert of it, sorted by expert.
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=c.experts.count)
        mlps = ExpertMLPs(c, self.dtype, name="experts")
        y = mlps(rows[order // c.experts.per_token], sizes.astype(jnp.int32))
        y = keep(y[jnp.argsort(order)]).reshape(*chosen.shape, -1)
        mixed = jnp.einsum("mcd,mc->md", y.astype(jnp.float32), weights)
        return mixed.astype(x.dtype).reshape(x.shape)


@jax.custom_vjp
def by_turns(x: Float[Array, "M both"]) -> tuple[Array, Array]:
    """Returns the even columns and the odd ones."""
    return x[:, ::2], x[:, 1::2]


# JAX's own gradient pads between columns, for which XLA's compiler for TPUs took more
# than 20 GB (5,760 columns, JAX 0.12.0.1).
by_turns.defvjp(
    lambda x: (by_turns(x), None),
    lambda _, g: (jnp.stack(g, axis=-1).reshape(len(g[0]), -1),),
)


def balance_loss(
    logits: Float[Array, "L M E"], weights: Float[Array, " M"], experts: Experts
) -> Float[Array, ""]:
    """Returns the loss that balances the loads of experts, as transformers has it.

    It is smallest, `per_token`, where all experts compute as many tokens (Switch
    Transformers, arXiv:2101.03961, equations 4 to 6, over all layers at once).

    Args:
        logits: Of the routers of all layers.
        weights: 1 for a token, 0 for padding.
        experts: The mixture.

    Example:
        >>> two = Experts(count=2, per_token=1)
        >>> logits = jnp.array([[[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]])
        >>> even, uneven = jnp.array([1.0, 1.0, 0.0]), jnp.array([1.0, 0.0, 1.0])
        >>> [round(float(balance_loss(logits, w, two)), 2) for w in (even, uneven)]
        [1.0, 2.0]
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, chosen = lax.top_k(shares, experts.per_token)
    loads = jnp.sum(jax.nn.one_hot(chosen, experts.count), axis=2)
    total = jnp.sum(weights) * len(logits)
    mean = lambda x: jnp.einsum("lme,m->e", x, weights) / total
    return experts.count * jnp.sum(mean(loads) * mean(shares))


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
