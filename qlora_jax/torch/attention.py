"""Attention in JAX for the models of transformers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax
from jax import lax
from jaxtyping import Array, Bool, Float

from .weights import as_array, as_tensor

ATTENTION_NAME = "qlora_jax"  # the `attn_implementation` in transformers
BLOCK = 256  # number of queries whose scores are in memory at the same time


def register_attention() -> None:
    """Registers `attn_implementation="qlora_jax"` in transformers.

    A model that is made with this setting computes attention in JAX, for one block of
    queries at a time. The scores of a block are computed again in the backward pass.
    Memory therefore grows with the number of tokens, and not with its square. If
    several query heads share a key/value head, no copies of it are made. The masks come
    from transformers: for sliding windows, for padding, and for packed rows, in which
    `position_ids` start again at 0 with each sequence.

    Example:
        >>> import qlora_jax as ql
        >>> from transformers import AttentionInterface
        >>> ql.torch.register_attention()
        >>> "qlora_jax" in AttentionInterface()
        True
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # 1. Always make a mask. By default, transformers makes none if a mask is causal or
    # all True. `attention` could not tell these two cases apart.
    options = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    # 2. Use broadcasting, which gives the same masks. PyTorch's `vmap`, which
    # transformers uses for the masks of images, does not work in torchax.
    options |= {"use_vmap": False}

    def make_mask(**kwargs: Any) -> Any:
        return sdpa_mask(**{**kwargs, **options})

    AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
    AttentionInterface.register(ATTENTION_NAME, attention)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    record_mask: Callable[[jax.Array], object] | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Computes attention for transformers, whose tensors are `[B, heads, T, Dh]`.

    If `record_mask` is given, it is called with the mask. `packing_problem` uses this.
    Further arguments from transformers, such as `sliding_window`, are ignored, because
    the mask already takes them into account.
    """
    del kwargs
    if position_bias is not None:
        raise NotImplementedError(
            f"attention {ATTENTION_NAME!r} does not add `position_bias`. Use "
            'attn_implementation="eager" for this model.'
        )
    q, k, v = (as_array(x) for x in (query, key, value))
    mask = None if attention_mask is None else as_array(attention_mask)
    if mask is None:  # the model itself passed none
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        tokens, sources = q.shape[2], k.shape[2]
        mask = jnp.ones((1, 1, tokens, sources), bool)
        if is_causal and tokens > 1:
            mask = jnp.tril(mask)
    elif mask.dtype != jnp.bool_:
        raise TypeError(
            f"masks of attention {ATTENTION_NAME!r} must be bool, True where a token "
            f"is seen. Got {mask.dtype}."
        )
    if record_mask is not None:
        record_mask(mask)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = None if s_aux is None else as_array(s_aux)
    rng = torchax.default_env().get_and_rotate_prng_key() if dropout else None
    y = attend(
        q, k, v, mask, scale=scale, soft_cap=softcap, sinks=sinks, rate=dropout, rng=rng
    )
    return as_tensor(y.swapaxes(1, 2)), None


def attend(
    query: Float[Array, "B H T Dh"],
    key: Float[Array, "B K S Dh"],
    value: Float[Array, "B K S Dv"],
    mask: Bool[Array, "B _ T S"],
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    rate: float = 0.0,
    rng: Array | None = None,
) -> Float[Array, "B H T Dv"]:
    """Computes attention for one block of queries at a time.

    Scores and their softmax are in float32, and the result has the dtype of `query`.
    The mask has one head or H heads. Dropout with probability `rate` acts on the
    attention weights, and needs the key `rng`.
    """
    batch, heads, tokens, size = query.shape
    # G query heads share a key/value head.
    kv_heads, group_size = key.shape[1], heads // key.shape[1]
    query = query.reshape(batch, kv_heads, group_size, tokens, size)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(kv_heads, group_size, 1, 1)

    @jax.checkpoint
    def attend_block(block: tuple) -> Array:
        # For a block of t queries, `q` is [B, K, G, t, Dh], and `visible` is
        # [B, 1 or H, t, S].
        q, visible, block_rng = block
        scores = jnp.einsum(
            "bkgtd,bksd->bkgts", q, key, preferred_element_type=jnp.float32
        )
        scores = scores * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        # The mask becomes [B, K, G, t, S] if each head has its own, and otherwise
        # [B, 1, 1, t, S].
        is_per_head = visible.shape[1] > 1
        shape = (kv_heads, group_size) if is_per_head else (1, 1)
        visible = visible.reshape(-1, *shape, *visible.shape[2:])
        # With -inf, a query that sees no key, such as one of padding, would give NaN.
        scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
        highest = scores.max(-1, keepdims=True)
        if sinks is not None:
            highest = jnp.maximum(highest, sinks)
        highest = lax.stop_gradient(highest)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        if sinks is not None:  # a sink takes a share of the weight, but has no value
            total = total + jnp.exp(sinks - highest)
        weights = weights / total
        if rate:
            is_kept = jax.random.bernoulli(block_rng, 1 - rate, weights.shape)
            weights = jnp.where(is_kept, weights / (1 - rate), 0)
        return jnp.einsum("bkgts,bksd->bkgtd", weights.astype(value.dtype), value)

    num_blocks = -(-tokens // BLOCK)
    rngs = None if rng is None else jax.random.split(rng, num_blocks)
    if num_blocks == 1:
        output = attend_block((query, mask, None if rngs is None else rngs[0]))
    else:
        split = functools.partial(_split_tokens, num_blocks=num_blocks)
        blocks = lax.map(attend_block, (split(query), split(mask), rngs))
        output = jnp.moveaxis(blocks, 0, 3)  # [B, K, G, num_blocks, t, Dv]
        output = output.reshape(batch, heads, num_blocks * BLOCK, -1)[:, :, :tokens]
    return output.reshape(batch, heads, tokens, -1).astype(query.dtype)


def _split_tokens(x: Array, num_blocks: int) -> Array:
    """Splits the second-to-last axis into blocks, along a new first axis.

    The last block is padded with zeros.
    """
    padding = [(0, 0)] * x.ndim
    padding[-2] = (0, num_blocks * BLOCK - x.shape[-2])
    x = jnp.pad(x, padding)
    blocks = x.reshape(*x.shape[:-2], num_blocks, BLOCK, x.shape[-1])
    return jnp.moveaxis(blocks, -3, 0)
