"""Generates tokens. Batches of prompts and streams use the same compiled function."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Int, Key, PyTree

from .decoder import Cache
from .sampling import GREEDY, Sampling
from .torch_decoder import TorchDecoder

Model = nn.Module | TorchDecoder  # a `Decoder`, wrapped or not, or a model in PyTorch


def power_of_two(length: int) -> int:
    """Returns the smallest power of two that is at least `length`."""
    return 1 << (length - 1).bit_length()


def pad_prompts(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the tokens of prompts, padded on the right to one of few lengths.

    Few lengths mean few compiled programs.
    """
    longest = width = max(map(len, prompts))
    if longest > 1:  # a single token, such as the last one of an answer, is not padded
        width = max(16, power_of_two(longest))
        if 16 < width and longest <= width * 3 // 4:
            width = width * 3 // 4
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def check_key(sampling: Sampling, key: Key[Array, ""] | None) -> None:
    """Raises a ValueError if tokens are drawn without a key."""
    if key is None and not sampling.is_greedy:
        raise ValueError("`key` must be given if `temperature` is not 0.")


def check_length(model: Model, prompt_length: int, max_new_tokens: int) -> None:
    """Raises a ValueError if an answer may exceed the model's learned positions."""
    limit = model.max_positions
    if limit is not None and prompt_length + max_new_tokens > limit:
        raise ValueError(
            "the prompt and `max_new_tokens` must have at most "
            f"{limit} tokens together, because the model has learned a table of "
            f"positions. Got {prompt_length} + {max_new_tokens}."
        )


def generate(
    model: Model,
    variables: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "B N"]:
    """Returns tokens that continue each prompt; stops early once every row has ended.

    `Stream` yields the tokens of one prompt one at a time.

    Args:
        model: A `Decoder`, wrapped or not, or a model in PyTorch's code.
        variables: The variables for `model.apply`.
        prompts: The tokens of B prompts, each with at least one.
        max_new_tokens: N, the largest length of an answer.
        eos_ids: Tokens that end an answer. `eos_ids[0]` fills the row after the end.
        sampling: The sampling settings.
        key: PRNG key; needed unless sampling is greedy. The n-th token of an answer is
            drawn with `jax.random.fold_in(key, n)`.
    """
    if not len(prompts) or max_new_tokens < 1:
        raise ValueError(
            "there must be at least one prompt, and `max_new_tokens` must be positive. "
            f"Got {len(prompts)} prompts and {max_new_tokens}."
        )
    check_key(sampling, key)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.all():
        raise ValueError("`prompts` must each have at least one token. Got none.")
    check_length(model, max(lengths), max_new_tokens)
    operands = variables, pad_prompts(prompts), np.zeros_like(lengths), lengths, key
    static = {"model": model, "sampling": sampling, "num_new": max_new_tokens}
    return extend(*operands, **static, eos_ids=tuple(eos_ids))[0]


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampling", "num_new", "eos_ids"),
    donate_argnames="cache",
)
def extend(
    variables: PyTree,
    tokens: Int[Array, "B T"],
    starts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    key: Key[Array, ""] | None,
    step: Int[Array, ""] | int = 0,
    cache: Cache | None = None,
    *,
    model: Model,
    sampling: Sampling,
    num_new: int = 1,
    eos_ids: tuple[int, ...] = (),
) -> tuple[Int[Array, "B N"], Cache]:
    """Adds tokens to a cache, and returns the `num_new` tokens that follow.

    `starts` has the number of tokens of each row in the cache, and `lengths` the number
    in `tokens`, which is padded on the right. `step` is the number of tokens of the
    answer that earlier calls have drawn. If `cache` is None, this function creates one
    of the size that it needs.
    """
    batch_size, width = tokens.shape
    fill = eos_ids[0] if eos_ids else 0  # follows the end of an answer
    if cache is None:  # created here, so that XLA chooses its placement on a mesh
        cache = model.init_cache(batch_size, width + num_new)
    assert cache is not None

    def decode(tokens, cache: Cache, index, **inputs) -> tuple[Array, Cache]:
        """Returns the token `index` of this call's `num_new` tokens, and the cache."""
        outputs: Any = model.apply(variables, tokens, cache=cache, **inputs)
        logits, cache = outputs
        step_key = None if key is None else jax.random.fold_in(key, step + index)
        return sampling.choose(logits[:, 0], step_key).astype(tokens.dtype), cache

    def is_end(token):
        return jnp.isin(token, np.asarray(eos_ids, tokens.dtype))

    def is_unfinished(state):
        index, _, _, has_ended, _ = state
        return (index < num_new) & ~jnp.all(has_ended)

    def decode_next(state):
        index, output, token, has_ended, cache = state
        positions = (starts + lengths + index - 1)[:, None]  # [B, 1]
        token, cache = decode(token[:, None], cache, index, positions=positions)
        token = jnp.where(has_ended, fill, token)
        has_ended |= is_end(token)
        return index + 1, output.at[:, index].set(token), token, has_ended, cache

    # The first new token comes from the pass over `tokens`, and the loop computes the
    # others. Padding gets positions past the end, which are overwritten before use.
    inputs = {"positions": starts[:, None] + jnp.arange(width)[None]}
    inputs |= {"num_tokens": lengths, "select": lengths[:, None] - 1}
    first, cache = decode(tokens, cache, 0, **inputs)
    output = first[:, None]
    if num_new > 1:
        output = jnp.full((batch_size, num_new), fill, tokens.dtype)
        output = output.at[:, 0].set(first)
        state = jnp.int32(1), output, first, is_end(first), cache
        _, output, _, _, cache = lax.while_loop(is_unfinished, decode_next, state)
    if not get_abstract_mesh().empty:
        # On a mesh, each process needs the tokens of all rows.
        output = lax.with_sharding_constraint(output, PartitionSpec())
    return output, cache
