"""Multi-head latent attention, as in DeepSeek V2 and V3 (arXiv:2405.04434).

Keys and values are computed in two products. The first one gives a short latent vector
for each token. After a norm, the second one gives the keys and values of all heads.
Queries are computed in the same way, or in a single product. Only a part of each query
and key is rotated, and all heads share the rotated part of the key. Shapes: B batch, T
tokens, H heads.
"""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from .attention import Attention, LayerData, SharedKV, TokenData, rotate
from .config import DecoderConfig, LatentHeads, LayerKind
from .products import linear_names, make_dense, name_product

# The epsilon of the norms of latent vectors. As in transformers, it does not depend on
# the epsilon in the config.
_NORM_EPSILON = 1e-6


class LatentAttention(Attention):
    """Causal attention whose keys and values are computed from latent vectors.

    The cache contains the keys and values of all heads. Latent vectors would take less
    memory, but for each new token, those of all earlier tokens would have to be
    multiplied by `kv_b_proj` again.
    """

    split_outputs: ClassVar[tuple[str, ...]] = ("q_proj", "q_b_proj", "kv_b_proj")

    @nn.compact
    def __call__(
        self, x, tokens: TokenData, layer_data: LayerData, cache, shared_kv: SharedKV
    ):
        """Returns the output, the new keys and values, and the same `shared_kv`.

        The new keys and values are None without a cache.
        """
        c, heads, new_kv = self.config, latent_heads_of(self.kinds[0]), None
        table = self._select_table(tokens, layer_data)
        by_head = *x.shape[:2], c.num_heads, -1  # [B, T, H, _]
        # 1. Queries.
        width = c.num_heads * heads.head_dim
        if heads.query_rank is None:
            query = self._dense(x, width, False, "q_proj")
        else:
            latent = self._dense(x, heads.query_rank, c.qkv_bias, "q_a_proj")
            query = self._dense(self._norm(latent, "q_a"), width, False, "q_b_proj")
        query, rotary = jnp.split(query.reshape(by_head), [heads.nope_dim], axis=-1)
        rotary = rotate(rotary, table, c.interleaved_rope)
        query = jnp.concatenate([query, rotary], axis=-1)
        # 2. Keys and values. All heads share the rotated part of the key.
        width = heads.kv_rank + heads.rope_dim
        latent = self._dense(x, width, c.qkv_bias, "kv_a_proj_with_mqa")
        latent, shared_key = jnp.split(latent, [heads.kv_rank], axis=-1)
        shared_key = rotate(shared_key[:, :, None], table, c.interleaved_rope)
        width = c.num_heads * (heads.nope_dim + heads.value_dim)
        key_value = self._dense(self._norm(latent, "kv_a"), width, False, "kv_b_proj")
        key_value = key_value.reshape(by_head)
        key, value = jnp.split(key_value, [heads.nope_dim], axis=-1)
        shape = *key.shape[:3], heads.rope_dim
        key = jnp.concatenate([key, jnp.broadcast_to(shared_key, shape)], axis=-1)
        # 3. Attention.
        if cache is not None:
            key, value, new_kv = self._join_cached(key, value, tokens, cache)
        is_cached = cache is not None
        mixed = self._attend(query, key, value, None, tokens, layer_data, is_cached)
        return self._dense(mixed, c.hidden_size, c.o_bias, "o_proj"), new_kv, shared_kv

    def _dense(self, x: Array, width: int, use_bias: bool, name: str) -> Array:
        return name_product(make_dense(width, use_bias, self.dtype, name)(x))

    def _norm(self, x: Float[Array, "B T _"], name: str) -> Array:
        return nn.RMSNorm(_NORM_EPSILON, self.dtype, name=f"{name}_layernorm")(x)

    @staticmethod
    def tensor_names(config: DecoderConfig, kind: LayerKind) -> dict[str, str]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        has_bias = {"kv_a_proj_with_mqa": config.qkv_bias, "kv_b_proj": False}
        has_bias |= {"o_proj": config.o_bias}
        norms = ["kv_a_layernorm"]
        if latent_heads_of(kind).query_rank is None:
            has_bias["q_proj"] = False
        else:
            has_bias |= {"q_a_proj": config.qkv_bias, "q_b_proj": False}
            norms.append("q_a_layernorm")
        names = {f"{norm}/scale": f"self_attn.{norm}.weight" for norm in norms}
        return names | linear_names("self_attn", has_bias)


def latent_heads_of(kind: LayerKind) -> LatentHeads:
    """Returns the sizes that all layers of a stack have."""
    assert kind.latent is not None
    return kind.latent
