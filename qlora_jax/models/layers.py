"""The layer that a decoder repeats."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import qlora_jax as ql

from .attention import Attention, LayerScalars, Tokens
from .config import DecoderConfig
from .experts import MixtureOfExperts
from .products import gated, keep, make_dense, make_norm


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    config: DecoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Returns the block's output, without the residual."""
        c = self.config
        dense = lambda width, name: make_dense(width, c.mlp_bias, self.dtype, name)
        if c.fused:
            both = keep(dense(2 * c.intermediate_size, "gate_up_proj")(x))
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = keep(dense(c.intermediate_size, "gate_proj")(x))
            up = keep(dense(c.intermediate_size, "up_proj")(x))
        return dense(c.hidden_size, "down_proj")(gated(c, gate, up))


class Layer(nn.Module):
    """Attention and MLP, each on a normalized copy, added to the residual stream."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    attention: str | Callable[..., Any] = "xla"
    mlp_tile: int | None = None

    @nn.compact
    def __call__(self, x, tokens: Tokens, scalars: LayerScalars, cache):
        """Returns the residual stream, and the new keys and values or None."""
        c, dtype = self.config, self.dtype
        x = ql.memory.layer_input(x)
        norm = lambda name: make_norm(c, dtype, name)
        attention = Attention(c, dtype, self.attention, name="self_attn")
        y, new = attention(norm("input_layernorm")(x), tokens, scalars, cache)
        # Gemma gives the name of Llama's norm before the MLP to one after attention.
        if c.post_norms:
            y = norm("post_attention_layernorm")(y)
        x = x + y.astype(x.dtype)
        before = "pre_feedforward" if c.post_norms else "post_attention"
        kind = GatedMLP if c.experts is None else MixtureOfExperts
        mlp = ql.linen.tiled(kind(c, dtype, name="mlp"), self.mlp_tile)
        y = mlp(norm(f"{before}_layernorm")(x))
        if c.post_norms:
            y = norm("post_feedforward_layernorm")(y)
        # Only the new ones: a scan that returned each layer's cache would copy it.
        return x + y.astype(x.dtype), new
