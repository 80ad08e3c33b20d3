"""Generates tokens for one prompt, one at a time, and decodes them."""

import os.path
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath, tree_map_with_path
from jaxtyping import Array, Key, PyTree

import qlora_jax as ql

from .config import DecoderConfig
from .decoder import Cache, Decoder, cache_length, grow_cache
from .generation import (
    Model,
    check_key,
    check_length,
    extend,
    pad_prompts,
    power_of_two,
)
from .sampling import GREEDY, Sampling
from .torch_decoder import TorchEngine

_MIN_CACHE_LENGTH = 256  # positions
# Tokenizers decode bytes that are not valid UTF-8, such as a part of a character, to
# the replacement character.
_REPLACEMENT = "\ufffd"


class Stream:
    """Continues one text at a time, token by token, and keeps its cache.

    If a prompt starts with the previous prompt and its answer, as the next turn of a
    conversation does, only its new tokens are computed. Prompts are padded to few
    lengths and the cache grows by doubling, so that few programs are compiled.
    """

    def __init__(self, model: Model, variables: PyTree, sampling: Sampling = GREEDY):
        """Starts with an empty cache.

        For speed, the scales of quantized weights are converted to float32, and on CPUs
        with JAX before 0.11 also 16-bit layers.
        """
        self.model, self.sampling = model, sampling
        self.variables = _speed_up(variables)
        self._cache: Cache | None = None
        self._ids: list[int] = []  # the tokens whose keys and values are in the cache
        self._answer: object = None  # identifies the iterator that may use the cache

    def __call__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        key: Key[Array, ""] | None = None,
    ) -> Iterator[int]:
        """Returns a lazy iterator over the tokens that continue a prompt.

        They include the one of `eos_ids` that ends the answer. The iterator raises a
        RuntimeError if a later iterator of the stream has started.
        """
        if not len(prompt):
            raise ValueError("`prompt` must have at least one token. Got none.")
        check_key(self.sampling, key)
        check_length(self.model, len(prompt), max_new_tokens)
        return self._continue(list(prompt), max_new_tokens, {*eos_ids}, key)

    def _continue(self, prompt, max_new_tokens, eos_ids, key) -> Iterator[int]:
        # Keep the cache up to the first difference. The last token of the prompt is
        # always computed, because its logits are needed.
        num_shared = len(os.path.commonprefix([prompt[:-1], self._ids]))
        if num_shared < len(self._ids) and self.model.has_states:
            num_shared, self._cache = 0, None  # states cannot go back
        del self._ids[num_shared:]
        answer = self._answer = object()
        max_length = len(prompt) + max_new_tokens
        self._reserve(len(prompt), max_length)  # may clear the cache
        new_ids = prompt[len(self._ids) :]
        for step in range(max_new_tokens):
            if self._answer is not answer:
                raise RuntimeError(
                    "an iterator must not be used after its stream is called again."
                )
            self._reserve(len(self._ids) + len(new_ids), max_length)
            token = self._add(new_ids, step, key)
            yield token
            if token in eos_ids:
                return
            new_ids = [token]

    def _reserve(self, length: int, max_length: int) -> None:
        """Makes room for `length` positions. Later calls need at most `max_length`."""
        config: DecoderConfig | TorchEngine = self.model.config
        # In LongRoPE, keys depend on the size of the cache. It therefore gets its final
        # size at once, and is cleared if that size changes.
        ropes = [rope for rope in config.ropes if rope and rope.long_divisors]
        size = power_of_two(max(max_length if ropes else length, _MIN_CACHE_LENGTH))
        for rope in ropes:  # rounding up must not select `long_divisors`
            if max_length <= rope.original_length < size:
                size = rope.original_length
        cache = self._cache
        if cache is None or (ropes and cache_length(cache) != size):
            self._cache, self._ids = self.model.init_cache(1, size), []
        elif cache_length(cache) < size:
            self._cache = grow_cache(cache, size)

    def _add(self, new_ids: list[int], step: int, key: Key[Array, ""] | None) -> int:
        """Adds tokens to the cache; returns the next token."""
        counts = len(self._ids), len(new_ids)
        start, length = (np.array([count], np.int32) for count in counts)
        cache, self._cache = self._cache, None  # `extend` donates its arrays
        padded = pad_prompts([new_ids])
        operands = self.variables, padded, start, length, key, np.int32(step)
        static = {"model": self.model, "sampling": self.sampling}
        tokens, self._cache = extend(*operands, cache, **static)
        self._ids += new_ids
        return tokens.item()


def _speed_up(variables: PyTree) -> PyTree:
    """Converts variables, without changing values, so that each token is faster."""
    # Before JAX 0.11, XLA on CPUs converts 16-bit arrays to 32 bits in order to slice
    # them. Since a scan slices the parameters of the layers, it would first convert
    # those of all layers, and do so for each token.
    widens = jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11)

    def convert_leaf(path: KeyPath, x: Any) -> Any:
        if ql.is_packed(x):
            return x.with_float_scales()
        group_name = getattr(path[1], "key", "") if len(path) > 1 else ""
        is_layer = any(re.fullmatch(p, group_name) for p in Decoder.scanned)
        if widens and is_layer and x.dtype in (jnp.bfloat16, jnp.float16):
            return x.astype(jnp.float32)
        return x

    return tree_map_with_path(convert_leaf, variables, is_leaf=ql.is_packed)


class TextStream:
    """Turns tokens into pieces of text that never end in the middle of a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._end = 0  # range of the tokens of the last piece

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now complete, which may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        return "" if text.endswith(_REPLACEMENT) else self._cut(text)

    def flush(self) -> str:
        """Returns the incomplete text that remains after the last token."""
        return self._cut(self._decode(self._ids[self._start :]))

    def _cut(self, text: str) -> str:
        # Decoders treat the first token of a text differently, so the tokens of the
        # previous piece are decoded too, and their text is cut off.
        previous = self._decode(self._ids[self._start : self._end])
        self._start, self._end = self._end, len(self._ids)
        return text[len(previous) :]
