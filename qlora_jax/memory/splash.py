"""Attention that does not store all scores, with JAX's splash kernel for TPUs."""

import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

LANES = 128  # the kernel needs lengths that are a multiple of this
BLOCK_SIZES = 512, 256, 128  # tokens, best first
# The name of the result and of the logarithms of the softmax sums for checkpoint
# policies. These and the operands are all residuals of the kernel.
RESIDUALS_NAME = "attention"


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
    """Returns causal attention in the dtype of `query`, with JAX's splash kernel.

    The kernel is the one in jax.experimental.pallas.ops.tpu. In both passes, it stores
    the scores of only one block of queries and keys at a time. Each query attends to
    itself and to the tokens before it in its row, segment and window. H / K query heads
    share a key head.

    Queries are scaled in float32 and rounded to their dtype. Scores, softmax and sums
    are float32. For checkpoint policies, the residuals of the backward pass (the result
    and the logarithms of the sums) have the name "attention". T is padded to a multiple
    of 128. XLA does not partition the kernel: with several devices, call it in a
    `jax.shard_map` over rows or heads.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        scale: The factor by which scores are multiplied, by default `Dh ** -0.5`.
        soft_cap: Bounds the scores to `soft_cap * tanh(scores / soft_cap)`.
        window: The number of tokens that a query attends to, including itself. Pass
            None for no limit.
        segment_ids: The sequence that each token belongs to, for rows in which several
            sequences are packed.
        sinks: An extra score for each head, which has no value vector and is the same
            for all queries (gpt-oss).
        interpret: Whether to run Pallas' interpreter, which is slow but needs no TPU.

    Raises:
        ValueError: If the shapes do not match, `window` is not positive, or `soft_cap`
            is not positive and finite.
        NotImplementedError: If the program is compiled for a platform other than TPUs,
            without `interpret`.

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

    # 1. Check the arguments and scale the queries.
    # 2. Bring the operands into the kernel's layout, [B, heads, T padded, Dh].
    # 3. Map the kernel, which is for one row, over the rows.
    # 4. Bring the result back into [B, T, H, Dh].
    _check(query, key, value, window, soft_cap, segment_ids, sinks)
    _, num_tokens, num_heads, head_dim = query.shape
    factor = head_dim**-0.5 if scale is None else scale
    query = (query.astype(jnp.float32) * factor).astype(query.dtype)
    padding = -num_tokens % LANES

    def to_kernel_layout(x: Array) -> Array:
        x = x.swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x

    operands = [to_kernel_layout(x) for x in (query, key, value)]
    if not interpret:
        operands[0] = only_on_tpu(operands[0])
    kernel = _make_kernel(num_heads, num_tokens + padding, window, soft_cap, interpret)
    segments = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, padding)))
        segments = splash.SegmentIds(ids, ids)
    attended = jax.vmap(kernel, (0, 0, 0, 0, None))(*operands, segments, sinks)
    # The mask is causal, so no token attends to the padding after it.
    return attended.astype(query.dtype).swapaxes(1, 2)[:, :num_tokens]


def _check(query, key, value, window, soft_cap, segment_ids, sinks) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "`query` and `key` must have four axes, [B, T, heads, size]. Got shapes "
            f"{query.shape} and {key.shape}."
        )
    (*rows, heads, dim), (*key_rows, key_heads, key_dim) = query.shape, key.shape
    if value.shape != key.shape or rows != key_rows or dim != key_dim:
        raise ValueError(
            "`query`, `key` and `value` must have the same shapes, but `query` may "
            f"have more heads. Got {query.shape}, {key.shape} and {value.shape}."
        )
    if not key_heads or heads % key_heads:
        raise ValueError(
            "the number of heads of `key` must divide that of `query`. Got "
            f"{key_heads} and {heads}."
        )
    if window is not None and window < 1:
        raise ValueError(f"`window` must be positive or None. Got {window}.")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"`soft_cap` must be finite and positive. Got {soft_cap}.")
    if segment_ids is not None and [*segment_ids.shape] != rows:
        raise ValueError(
            f"`segment_ids` must have shape {tuple(rows)}. Got {segment_ids.shape}."
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(
            f"`sinks` must have shape ({heads},), one for each head of `query`. "
            f"Got {sinks.shape}."
        )


def _make_kernel(
    num_heads: int,
    num_tokens: int,
    window: int | None,
    soft_cap: float | None,
    interpret: bool,
) -> Any:
    """Returns a function of q `[H, T, Dh]`, k, v `[K, T, Dh]`, segments and sinks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = num_tokens, num_tokens
    mask = splash.CausalMask(shape)
    if window is not None and window < num_tokens:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = next(size for size in BLOCK_SIZES if num_tokens % size == 0)
    # These are sizes for two separate backward kernels. A fused one would store
    # gradients of q for each block of keys, which grow with the square of the number of
    # tokens.
    axes = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: dict[str, Any] = {f"block_{axis}": block for axis in axes}
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=RESIDUALS_NAME,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


# The platform of a program is known when it is lowered, and not yet when it is traced:
# a machine without a TPU may compile for one. The check is therefore in the lowering
# rule of an operation that is the identity on TPUs and raises an error elsewhere.
_only_on_tpu = Primitive("only_on_tpu")


def only_on_tpu(x: Array) -> Array:
    """Returns `x`. Lowering for another platform raises NotImplementedError."""
    return _only_on_tpu.bind(x)


def _raise_off_tpu(ctx: Any, x: object) -> NoReturn:
    del x
    raise NotImplementedError(
        "`splash_attention` must run on a TPU: its kernel does not compile for other "
        f"platforms. Got {' and '.join(ctx.module_context.platforms)}. Use attention "
        "in XLA, or `interpret=True` for a test."
    )


# Outside of `jit`, the operation is compiled too, so that the check runs.
_only_on_tpu.def_impl(jax.jit(only_on_tpu))
_only_on_tpu.def_abstract_eval(lambda x: x)
ad.deflinear2(_only_on_tpu, lambda g, x: [g])
batching.defvectorized(_only_on_tpu)
mlir.register_lowering(_only_on_tpu, lambda ctx, x: [x], platform="tpu")
mlir.register_lowering(_only_on_tpu, _raise_off_tpu)
