"""Generates answers to examples, and scores them."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh

from .._jax.progress import progress_bar
from ..models.decoder import init_cache
from ..models.generation import generate, padded_length
from ..models.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from .data.chat_tokenizer import Tokenizer
    from .data.encode import Example


class Answered(NamedTuple):
    """An answer, without special tokens."""

    text: str
    new_tokens: int  # with the one that ended it
    finished: bool  # whether a token ended it


def answers(
    model: Any,
    variables: Any,
    tokenizer: "Tokenizer",
    examples: Sequence["Example"],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    key: Any = None,
    progress: bool = True,
) -> list[Answered]:
    """Returns the answer to each example."""
    found: list[Any] = [None] * len(examples)
    total = len(examples)
    with progress_bar("answering", " prompts", progress, total=total) as bar:
        for end_ids, part, size in _groups(examples, batch_size):
            prompts = [examples[index].prompt for index in part]
            new = _new_tokens(
                variables,
                # The last batch of a group is filled up, so that all have one size.
                *_pad(prompts + prompts[-1:] * (size - len(part))),
                key if key is None else jax.random.fold_in(key, part[0]),
                model=model,
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
                sampling=sampling,
            )
            for index, ids in zip(part, np.asarray(new).tolist(), strict=False):
                ends = [place for place, x in enumerate(ids) if x in end_ids]
                text = tokenizer.decode(ids[: ends[0] if ends else None])
                size = ends[0] + 1 if ends else len(ids)
                found[index] = Answered(text, size, bool(ends))
            bar.update(len(part))
    return found


def _groups(
    examples: Sequence["Example"], batch_size: int
) -> Iterator[tuple[tuple[int, ...], list[int], int]]:
    """Yields end tokens, example indices and rows of batches of similar length."""
    by_ends: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)):
        by_ends.setdefault(tuple(examples[index].end_ids), []).append(index)
    for end_ids, group in by_ends.items():
        size = min(batch_size, len(group))
        for start in range(0, len(group), size):
            yield end_ids, group[start : start + size], size


def exact_match(texts: Sequence[str], examples: Sequence["Example"]) -> float:
    """Returns the share of texts that equal the answer, but for spaces around it."""
    pairs = zip(texts, examples, strict=True)
    right = [text.strip() == example.answer.strip() for text, example in pairs]
    return sum(right) / len(right)


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), padded_length(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


@functools.partial(
    jax.jit, static_argnames=("model", "max_new_tokens", "end_ids", "sampling")
)
def _new_tokens(
    variables, tokens, lengths, key, *, model, max_new_tokens: int, end_ids, sampling
):
    batch, width = tokens.shape
    new = generate(
        functools.partial(model.apply, variables),
        tokens,
        lengths,
        init_cache(model.config, batch, width + max_new_tokens),
        max_new_tokens=max_new_tokens,
        eos_ids=end_ids,
        key=key,
        **dataclasses.asdict(sampling),
    )
    # On a mesh, each process needs all answers.
    is_split = not get_abstract_mesh().empty
    return lax.with_sharding_constraint(new, PartitionSpec()) if is_split else new
