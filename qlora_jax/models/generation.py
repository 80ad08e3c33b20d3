"""Greedy text from any decoder that keeps its keys and values in a cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def generate(
    apply: Callable[..., Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Any,
    *,
    max_new_tokens: int,
    eos_id: int,
) -> Int[Array, "B N"]:
    """Continues each prompt greedily; stops early once every row has ended.

    Args:
        apply: `functools.partial(model.apply, variables)`.
        tokens: Prompts, padded on the right.
        lengths: Tokens of each prompt, at least 1.
        cache: From `init_cache`, with room for T + `max_new_tokens`.
        max_new_tokens: N, the length of the answer.
        eos_id: Token that ends an answer; also fills what follows it.

    Returns:
        The new tokens, without the prompts.

    Example:
        >>> from functools import partial
        >>> from qlora_jax.models.config import DecoderConfig
        >>> from qlora_jax.models.decoder import Decoder, init_cache
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model, prompt = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> variables = model.init(jax.random.key(0), prompt)
        >>> new = generate(
        ...     partial(model.apply, variables), prompt, jnp.array([5]),
        ...     init_cache(config, 1, 8), max_new_tokens=3, eos_id=2)
        >>> new.shape
        (1, 3)
    """
    room = cache[0].shape[2]
    if room < tokens.shape[1] + max_new_tokens:
        raise ValueError(
            f"`cache` must have room for the prompt and `max_new_tokens`. Got {room} "
            f"positions for {tokens.shape[1]} + {max_new_tokens} tokens."
        )

    def choose(logits):
        return jnp.argmax(logits[:, 0], axis=-1).astype(tokens.dtype)

    def unfinished(state):
        step, _, token, _ = state
        return (step < max_new_tokens) & jnp.any(token != eos_id)

    def extend(state):
        step, out, token, cache = state
        place = (lengths + step - 1)[:, None]
        logits, cache = apply(token[:, None], positions=place, cache=cache)
        token = jnp.where(token == eos_id, eos_id, choose(logits))
        return step + 1, out.at[:, step].set(token), token, cache

    logits, cache = apply(tokens, cache=cache, select=lengths[:, None] - 1)
    first = choose(logits)
    out = jnp.full((tokens.shape[0], max_new_tokens), eos_id, tokens.dtype)
    state = (jnp.int32(1), out.at[:, 0].set(first), first, cache)
    return jax.lax.while_loop(unfinished, extend, state)[1]
