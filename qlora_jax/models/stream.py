"""Generates tokens for one prompt, one at a time, and decodes them."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path
from jaxtyping import Array, Key

import qlora_jax as ql

from .config import DecoderConfig
from .decoder import Decoder, cache_length, init_cache
from .generation import check_key, next_tokens, padded_length, power_of_two
from .sampling import GREEDY, Sampling

_SMALLEST_CACHE = 256  # positions
_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no UTF-8


class Stream:
    """Continues one text at a time, token by token, and keeps its cache.

    A prompt that starts as the last one and its answer, such as the next turn of a
    conversation, is computed only from where it differs. Prompts are padded to
    few lengths and the cache grows by doubling, so that few programs are compiled.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model = Decoder(config)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
        >>> stream = Stream(model, variables)
        >>> len(list(stream([1, 2, 3], max_new_tokens=4, eos_ids=[])))
        4
    """

    def __init__(self, model: Any, variables: Any, sampling: Sampling = GREEDY):
        """Starts with an empty cache.

        Args:
            model: A `Decoder`, wrapped or not.
            variables: The variables for `model.apply`. Scales are kept in float32, and
                before JAX 0.11 on CPUs layers of 16 bits, too.
            sampling: The sampling settings.
        """
        self.model, self.sampling = model, sampling
        self.variables = _ready(variables)
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
            key: PRNG key; needed unless sampling is greedy.

        Returns:
            A lazy iterator of the new tokens, the one that ends them included. After a
            later call it raises a RuntimeError.

        Raises:
            ValueError: If the prompt is empty, or there is no key to draw with.
        """
        if not len(prompt):
            raise ValueError("`prompt` must have at least one token. Got none.")
        check_key(self.sampling, key)
        return self._continue(list(prompt), max_new_tokens, {*eos_ids}, key)

    def with_lora(self, lora: Any) -> "Stream":
        """Returns a stream with other adapters and an empty cache.

        Args:
            lora: The lora tree.
        """
        other = copy.copy(self)
        other.variables = {**self.variables, "lora": lora}
        other._cache, other._ids = None, []
        return other

    def _continue(self, prompt, max_new_tokens, eos_ids, key) -> Iterator[int]:
        pairs = zip(prompt[:-1], self._ids, strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        del self._ids[sum(1 for _ in same) :]
        answer = self._answer = object()
        last = len(prompt) + max_new_tokens
        self._make_room(len(prompt), last)
        new = prompt[len(self._ids) :]
        for step in range(max_new_tokens):
            if self._answer is not answer:
                raise RuntimeError("the stream must be on the last prompt given to it.")
            self._make_room(len(self._ids) + len(new), last)
            token = self._next(new, step, key)
            yield token
            if token in eos_ids:
                return
            new = [token]

    def _make_room(self, length: int, last: int) -> None:
        """Makes the cache hold `length` positions, of at most `last` in the end."""
        config: DecoderConfig = self.model.config
        # LongRoPE's keys depend on the size of the cache: it gets its last size now,
        # and starts anew if that changes.
        ropes = [rope for rope in config.ropes if rope and rope.long_divisors]
        room = power_of_two(max(last if ropes else length, _SMALLEST_CACHE))
        for rope in ropes:
            if last <= rope.original_length < room:
                room = rope.original_length
        cache = self._cache
        if cache is None or (ropes and cache_length(cache) != room):
            self._cache, self._ids = init_cache(config, 1, room), []
        elif cache_length(cache) < room:
            new = room - cache_length(cache)
            widths = [(0, 0), (0, 0), (0, 0), (0, new), (0, 0)]
            self._cache = tuple(jnp.pad(x, widths) for x in cache)

    def _next(self, new: list[int], step: int, key: Any) -> int:
        """Adds tokens to the cache; returns the next token."""
        width = 1 if len(new) == 1 else padded_length(len(new))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(new)] = new
        cache, self._cache = self._cache, None  # donated
        counts = np.array([len(self._ids), len(new) - 1, step], np.int32)
        static = {"model": self.model, "sampling": self.sampling}
        operands = self.variables, tokens, counts, cache, key
        token, self._cache = _extend(*operands, **static)
        self._ids += new
        return int(token)


def _ready(variables: Any) -> Any:
    """Returns variables of the same values that take less time at each token."""
    is_packed = lambda x: isinstance(x, ql.QTensor)
    # XLA on CPUs slices in 32 bits there: a scan over layers would first convert all of
    # them, at each token.
    widens = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11)

    def ready(path: Any, x: Any) -> Any:
        if is_packed(x):
            return x.with_float_scales()
        is_layer = any(getattr(key, "key", None) in Decoder.scanned for key in path)
        if widens and is_layer and x.dtype in (jnp.bfloat16, jnp.float16):
            return x.astype(jnp.float32)
        return x

    return tree_map_with_path(ready, variables, is_leaf=is_packed)


@functools.partial(
    jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache"
)
def _extend(variables, tokens, counts, cache, key, *, model, sampling: Sampling):
    """Returns the token after `tokens[0, last]`, and the cache with them in it.

    `counts` are the tokens in the cache, `last`, and the tokens chosen before.
    """
    start, last, step = counts
    # Padding gets positions past the end, which are overwritten before they are seen.
    places = {"positions": start + jnp.arange(tokens.shape[1])[None]}
    places["select"] = last[None, None]
    apply = functools.partial(model.apply, variables)
    token, cache = next_tokens(apply, sampling, tokens, cache, key, step, **places)
    return token[0], cache


class TextStream:
    """Turns tokens into pieces of text that never end within a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # of the last piece
        self._end = 0  # of the last piece

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now complete, perhaps none."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        return "" if text.endswith(_INCOMPLETE) else self._cut(text)

    def rest(self) -> str:
        """Returns the text held back, once there are no more tokens."""
        return self._cut(self._decode(self._ids[self._start :]))

    def _cut(self, text: str) -> str:
        # Decoders treat the first token of a text differently, so the tokens of the
        # piece before are decoded too.
        known = self._decode(self._ids[self._start : self._end])
        self._start, self._end = self._end, len(self._ids)
        return text[len(known) :]
