"""Attention that holds no scores: JAX's splash kernel for TPUs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .only_tpu import only_on_tpu

LANES = 128  # lengths are multiples of it
BLOCKS = 512, 256, 128
# Names the result and the logarithms of the sums: with the operands, all residuals.
NAME = "attention"


def splash_attention(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B T K Dh"],
    value: Float[Array, "B T K Dh"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    sinks: Float[Array, " H"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H Dh"]:
    """Returns causal attention in the dtype of `query`, by JAX's splash kernel.

    The kernel is that of jax.experimental.pallas.ops.tpu. Scores exist for a block of
    queries and keys at a time, in both passes. Each query attends to itself and to the
    tokens before it in its row, segment and window. H / K query heads share a key head.

    Queries are scaled in float32 and rounded to their dtype; scores, softmax and sums
    are float32. For checkpoint policies, the residuals of the backward pass (the result
    and the logarithms of the sums) have the name "attention". T is padded to a multiple
    of 128. XLA does not partition the kernel: with several devices, call it in a
    `jax.shard_map` over rows or heads.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        scale: Factor of the scores, by default `Dh ** -0.5`.
        soft_cap: Bound of the scores, `soft_cap * tanh(scores / soft_cap)`.
        window: How many tokens a query sees, itself included; None for all before it.
        segment_ids: Which of the sequences packed in its row a token belongs to.
        sinks: A score of each head that has no value (gpt-oss): of all its queries.
        interpret: Whether to run Pallas' interpreter, which needs no TPU and is slow.

    Raises:
        ValueError: If shapes do not fit, or `window` or `soft_cap` is not positive.
        NotImplementedError: When the program is compiled for another platform than a
            TPU, without `interpret`.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 64))
        >>> got = ql.memory.splash_attention(q, k, v, window=16, interpret=True)
        >>> want = jax.nn.dot_product_attention(
        ...     q, k, v, is_causal=True, local_window_size=(15, 0))
        >>> bool(jnp.allclose(got, want, atol=1e-5))
        True
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _check(query, key, value, window, soft_cap, segment_ids)
    if sinks is not None and sinks.shape != query.shape[2:3]:
        raise ValueError(
            f"`sinks` must have shape ({query.shape[2]},), one for each head of "
            f"`query`. Got {sinks.shape}."
        )
    dtype, (tokens, dim) = query.dtype, (query.shape[1], query.shape[3])
    factor = dim**-0.5 if scale is None else scale
    query = (query.astype(jnp.float32) * factor).astype(dtype)
    pad = -tokens % LANES
    operands = [_heads_first(x, pad) for x in (query, key, value)]
    if not interpret:
        operands[0] = only_on_tpu(operands[0], "`splash_attention`")
    kernel = _make_kernel(query.shape[2], tokens + pad, window, soft_cap, interpret)
    segments = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, pad)))
        segments = splash.SegmentIds(ids, ids)
    in_rows = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    mixed = in_rows(*operands, segments, sinks)
    return mixed.astype(dtype).swapaxes(1, 2)[:, :tokens]


def _check(query, key, value, window, soft_cap, segment_ids) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "`query` and `key` must have four axes, [B, T, heads, size]. Got shapes "
            f"{query.shape} and {key.shape}."
        )
    (*rows, heads, dim), (*key_rows, key_heads, key_dim) = query.shape, key.shape
    if value.shape != key.shape or rows != key_rows or dim != key_dim:
        raise ValueError(
            "`query`, `key` and `value` must have the same shapes but for the query's "
            f"heads. Got {query.shape}, {key.shape} and {value.shape}."
        )
    if not key_heads or heads % key_heads:
        raise ValueError(
            "the heads of `key` must divide those of `query`. Got "
            f"{key_heads} and {heads}."
        )
    if window is not None and window < 1:
        raise ValueError(f"`window` must be positive or None. Got {window}.")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"`soft_cap` must be positive or None. Got {soft_cap}.")
    if segment_ids is not None and [*segment_ids.shape] != rows:
        raise ValueError(
            f"`segment_ids` must have shape {tuple(rows)}. Got {segment_ids.shape}."
        )


def _heads_first(x: Array, pad: int) -> Array:
    """`[B, T, heads, Dh]` to `[B, heads, T + pad, Dh]`."""
    x = x.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) if pad else x


def _make_kernel(
    heads: int, tokens: int, window: int | None, soft_cap: float | None, interpret: bool
) -> Any:
    """Returns a function of q `[H, T, Dh]`, k and v `[K, T, Dh]` and segments."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = tokens, tokens
    mask = splash.CausalMask(shape)
    if window is not None and window < tokens:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = next(size for size in BLOCKS if tokens % size == 0)
    # The fused backward kernel would hold gradients of q for each block of keys.
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=NAME,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
