"""Generates tokens for many prompts at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from .decoder import Cache, cache_length
from .sampling import Sampling


def power_of_two(length: int) -> int:
    """Returns the smallest power of two that is at least `length`."""
    return 1 << (length - 1).bit_length()


def padded_length(length: int) -> int:
    """Returns the length to which a prompt is padded.

    There are few such lengths, so that few programs are compiled.

    Example:
        >>> padded_length(3), padded_length(40), padded_length(50)
        (16, 48, 64)
    """
    size = max(16, power_of_two(length))
    return size * 3 // 4 if 16 < size and length <= size * 3 // 4 else size


def generate(
    apply: Callable[..., Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Cache,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, "B N"]:
    """Returns tokens that continue each prompt; stops early once every row has ended.

    Call it under `jax.jit`. `Stream` yields the tokens of one prompt one at a time.

    Args:
        apply: `functools.partial(model.apply, variables)`.
        tokens: Prompts, padded on the right.
        lengths: The number of tokens of each prompt, at least 1.
        cache: From `init_cache`, with at least T + `max_new_tokens` positions.
        max_new_tokens: N, the length of the answer.
        eos_ids: Tokens that end an answer. `eos_ids[0]` fills the row after the end.
        key: PRNG key; needed if `temperature` is not 0.
        temperature: As in `Sampling`: greedy by default.
        top_k: As in `Sampling`.
        top_p: As in `Sampling`.

    Raises:
        ValueError: If the cache is too small, a setting is out of range, or the key is
            missing.

    Example:
        >>> from functools import partial
        >>> from qlora_jax.llm.models.config import DecoderConfig
        >>> from qlora_jax.llm.models.decoder import Decoder, init_cache
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model, prompt = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> variables = model.init(jax.random.key(0), prompt)
        >>> new = generate(
        ...     partial(model.apply, variables), prompt, jnp.array([5]),
        ...     init_cache(config, 1, 8), max_new_tokens=3, eos_ids=[2])
        >>> new.shape
        (1, 3)
    """
    sampling = Sampling(temperature, top_k, top_p)
    check_key(sampling, key)
    num_positions = cache_length(cache)
    if num_positions < tokens.shape[1] + max_new_tokens:
        raise ValueError(
            "`cache` must have room for the prompt and `max_new_tokens`. Got "
            f"{num_positions} positions for {tokens.shape[1]} + {max_new_tokens} "
            "tokens."
        )
    fill = eos_ids[0] if len(eos_ids) else 0

    decode = functools.partial(next_tokens, apply, sampling, key=key)

    def is_end(token):
        return jnp.isin(token, np.asarray(eos_ids, tokens.dtype))

    def is_unfinished(state):
        step, _, _, has_ended, _ = state
        return (step < max_new_tokens) & ~jnp.all(has_ended)

    def extend(state):
        step, output, token, has_ended, cache = state
        positions = (lengths + step - 1)[:, None]  # [B, 1]
        token, cache = decode(token[:, None], cache, step=step, positions=positions)
        token = jnp.where(has_ended, fill, token)
        has_ended |= is_end(token)
        return step + 1, output.at[:, step].set(token), token, has_ended, cache

    # The first token of each answer comes from the pass over the prompts, and the loop
    # computes the others.
    first, cache = decode(tokens, cache, step=0, select=lengths[:, None] - 1)
    output = jnp.full((tokens.shape[0], max_new_tokens), fill, tokens.dtype)  # [B, N]
    output = output.at[:, 0].set(first)
    state = (jnp.int32(1), output, first, is_end(first), cache)
    return jax.lax.while_loop(is_unfinished, extend, state)[1]


def next_tokens(
    apply: Callable[..., Any],
    sampling: Sampling,
    tokens: Int[Array, "B T"],
    cache: Cache,
    key: Key[Array, ""] | None,
    step: int | Int[Array, ""],
    **indices: Array,
) -> tuple[Int[Array, " B"], Cache]:
    """Returns the next token of each row, and the cache with `tokens` added.

    `indices` are the decoder's arguments `positions` and `select`. If T is not 1,
    `select` must choose one token of each row. `step` is the number of tokens drawn
    so far.
    """
    logits, cache = apply(tokens, cache=cache, **indices)
    step_key = None if key is None else jax.random.fold_in(key, step)
    return sampling.choose(logits[:, 0], step_key).astype(tokens.dtype), cache


def check_key(sampling: Sampling, key: Key[Array, ""] | None) -> None:
    """Raises a ValueError if tokens are drawn without a key."""
    if key is None and not sampling.is_greedy:
        raise ValueError("`key` must be given if `temperature` is not 0.")
