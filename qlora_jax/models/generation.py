"""Text from any decoder that keeps its keys and values in a cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from .decoder import init_cache
from .sampling import GREEDY, Sampling


def padded_length(length: int) -> int:
    """Returns a length that prompts are padded to, so that few programs are compiled.

    It is a power of two, at least 16, or three quarters of one.

    Example:
        >>> padded_length(3), padded_length(40), padded_length(50)
        (16, 48, 64)
    """
    size = max(16, 1 << (length - 1).bit_length())
    return size * 3 // 4 if 16 < size and length <= size * 3 // 4 else size


def generate(
    apply: Callable[..., Any],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cache: Any,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Array, "B N"]:
    """Continues each prompt; stops early once every row has ended.

    A function to call under `jax.jit`, for many prompts at once; `Stream` gives the
    tokens of one prompt as they come.

    Args:
        apply: `functools.partial(model.apply, variables)`.
        tokens: Prompts, padded on the right.
        lengths: Tokens of each prompt, at least 1.
        cache: From `init_cache`, with room for T + `max_new_tokens`.
        max_new_tokens: N, the length of the answer.
        eos_ids: Tokens that end an answer; the first one fills what follows.
        key: Where tokens are drawn; needed if `temperature` is not 0.
        temperature: As in `Sampling`: greedy by default.
        top_k: As in `Sampling`.
        top_p: As in `Sampling`.

    Returns:
        The new tokens, without the prompts.

    Raises:
        ValueError: If the cache is too small, a setting is out of its range, or there
            is no key to draw with.

    Example:
        >>> from functools import partial
        >>> from qlora_jax.models.config import DecoderConfig
        >>> from qlora_jax.models.decoder import Decoder, init_cache
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
    _check_key(sampling, key)
    room = cache[0].shape[2]
    if room < tokens.shape[1] + max_new_tokens:
        raise ValueError(
            f"`cache` must have room for the prompt and `max_new_tokens`. Got {room} "
            f"positions for {tokens.shape[1]} + {max_new_tokens} tokens."
        )
    filling = eos_ids[0] if len(eos_ids) else 0

    def choose(logits, step):
        step_key = None if key is None else jax.random.fold_in(key, step)
        return sampling.choose(logits[:, 0], step_key).astype(tokens.dtype)

    def is_end(token):
        return functools.reduce(
            jnp.logical_or, [token == end for end in eos_ids], False
        )

    def unfinished(state):
        step, _, _, ended, _ = state
        return (step < max_new_tokens) & ~jnp.all(ended)

    def extend(state):
        step, out, token, ended, cache = state
        place = (lengths + step - 1)[:, None]
        logits, cache = apply(token[:, None], positions=place, cache=cache)
        token = jnp.where(ended, filling, choose(logits, step))
        ended |= is_end(token)
        return step + 1, out.at[:, step].set(token), token, ended, cache

    logits, cache = apply(tokens, cache=cache, select=lengths[:, None] - 1)
    first = choose(logits, 0)
    out = jnp.full((tokens.shape[0], max_new_tokens), filling, tokens.dtype)
    ended = jnp.zeros(first.shape, bool) | is_end(first)
    state = (jnp.int32(1), out.at[:, 0].set(first), first, ended, cache)
    return jax.lax.while_loop(unfinished, extend, state)[1]


class Stream:
    """Continues one text at a time, token by token, and keeps what it has computed.

    A prompt that starts as the last one and its answer do, as the next turn of a
    conversation does, is computed only from where it differs. Prompts are padded to
    few lengths and the cache grows by doubling, so that few programs are compiled.

    Example:
        >>> from qlora_jax.models.config import DecoderConfig
        >>> from qlora_jax.models.decoder import Decoder
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model = Decoder(config)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
        >>> stream = Stream(model, variables)
        >>> len(list(stream([1, 2, 3], max_new_tokens=4, eos_ids=[])))
        4
    """

    def __init__(self, model: Any, variables: Any, sampling: Sampling = GREEDY):
        """Starts without a text.

        Args:
            model: A `Decoder`, wrapped or not.
            variables: What `model.apply` takes.
            sampling: How tokens are chosen.
        """
        self.model, self.variables, self.sampling = model, variables, sampling
        self._cache: Any = None
        self._ids: list[int] = []  # whose keys and values the cache holds
        self._answer: object = None  # the iterator that may use the cache

    def __call__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        key: Key[Array, ""] | None = None,
    ) -> Iterator[int]:
        """Continues a prompt.

        Args:
            prompt: Its tokens, at least one.
            max_new_tokens: How many tokens to yield at most.
            eos_ids: Tokens that end the answer.
            key: Where tokens are drawn; needed if they are.

        Returns:
            An iterator of the new tokens, each computed when it is asked for, the one
            that ends them included. After a later call it raises a RuntimeError.

        Raises:
            ValueError: If the prompt is empty, or there is no key to draw with.
        """
        if not len(prompt):
            raise ValueError("`prompt` must have at least one token. Got none.")
        _check_key(self.sampling, key)
        return self._continue(list(prompt), max_new_tokens, {*eos_ids}, key)

    def _continue(self, prompt, max_new_tokens, eos_ids, key) -> Iterator[int]:
        self._make_room(len(prompt) + max_new_tokens)
        known = 0
        while known < min(len(prompt) - 1, len(self._ids)):
            if prompt[known] != self._ids[known]:
                break
            known += 1
        del self._ids[known:]
        new = prompt[known:]
        answer = self._answer = object()
        for step in range(max_new_tokens):
            if self._answer is not answer:
                raise RuntimeError("the stream must be on the last prompt given to it.")
            token = self._next(new, step, key)
            yield token
            if token in eos_ids:
                return
            new = [token]

    def _make_room(self, length: int) -> None:
        """Starts anew where the cache is too small for `length` positions.

        What it holds cannot be kept: keys may depend on its length (`Rope`).
        """
        if self._cache is None or self._cache[0].shape[2] < length:
            self._cache = init_cache(self.model.config, 1, padded_length(length))
            self._ids = []

    def _next(self, new: list[int], step: int, key: Any) -> int:
        """Adds tokens to the cache; returns the one that comes next."""
        tokens = np.zeros(
            (1, 1 if len(new) == 1 else padded_length(len(new))), np.int32
        )
        tokens[0, : len(new)] = new
        cache, self._cache = self._cache, None  # donated
        token, self._cache = _extend(
            self.variables,
            tokens,
            np.int32(len(self._ids)),
            np.int32(len(new) - 1),
            cache,
            key,
            np.int32(step),
            model=self.model,
            sampling=self.sampling,
        )
        self._ids += new
        return int(token)


def _check_key(sampling: Sampling, key: Key[Array, ""] | None) -> None:
    """Refuses to draw without a key."""
    if key is None and not sampling.is_greedy:
        raise ValueError("`key` must be given where `temperature` is not 0.")


@functools.partial(
    jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache"
)
def _extend(
    variables, tokens, start, last, cache, key, step, *, model, sampling: Sampling
):
    """Returns the token after `tokens[0, last]`, and the cache with them in it."""
    # Padding gets positions past the end, which are overwritten before they are seen.
    positions = start + jnp.arange(tokens.shape[1])[None]
    logits, cache = model.apply(
        variables, tokens, positions=positions, cache=cache, select=last[None, None]
    )
    step_key = None if key is None else jax.random.fold_in(key, step)
    return sampling.choose(logits[:, 0], step_key)[0], cache
