"""Generates answers to examples, and scores them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from ..models.generation import generate
from ..models.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from ..data.chat_tokenizer import Tokenizer
    from ..data.encode import Example


class GeneratedAnswer(NamedTuple):
    """An answer of a model."""

    text: str  # without the end token
    new_tokens: int  # the number of tokens, including the end token
    finished: bool  # whether an end token was generated


def generate_answers(
    model: Any,
    variables: Mapping[str, Any],
    tokenizer: "Tokenizer",
    examples: Sequence["Example"],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    progress: bool = True,
) -> list[GeneratedAnswer]:
    """Returns the answer to each example."""
    answers: dict[int, GeneratedAnswer] = {}  # by the index of the example
    # None hides the bar unless stderr is a terminal.
    disable = None if progress else True
    with tqdm(
        desc="answering", unit=" prompts", disable=disable, total=len(examples)
    ) as bar:
        for end_ids, indices, num_rows in _make_batches(examples, batch_size):
            prompts = [examples[index].prompt for index in indices]
            generated = generate(
                model,
                variables,
                # The last batch with these end tokens repeats a prompt until it has the
                # size of the others, which saves compiling another program.
                prompts + prompts[-1:] * (num_rows - len(indices)),
                max_new_tokens=max_new_tokens,
                eos_ids=end_ids,
                sampling=sampling,
                # Each batch gets a key of its own, from the index of its first example.
                key=key if key is None else jax.random.fold_in(key, indices[0]),
            )
            rows = np.asarray(generated).tolist()
            for index, ids in zip(indices, rows, strict=False):  # drops repeated rows
                end = next((i for i, x in enumerate(ids) if x in end_ids), None)
                new_tokens = len(ids) if end is None else end + 1
                text = tokenizer.decode(ids[:end])
                answers[index] = GeneratedAnswer(text, new_tokens, end is not None)
            bar.update(len(indices))
    return [answers[index] for index in range(len(examples))]


def _make_batches(
    examples: Sequence["Example"], batch_size: int
) -> Iterator[tuple[tuple[int, ...], list[int], int]]:
    # Yields the end tokens, the example indices and the number of rows of each batch.
    # The examples of a batch have the same end tokens and prompts of similar length.
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)):
        groups.setdefault(tuple(examples[index].end_ids), []).append(index)
    for end_ids, group in groups.items():
        size = min(batch_size, len(group))
        for start in range(0, len(group), size):
            yield end_ids, group[start : start + size], size


def exact_match(texts: Sequence[str], examples: Sequence["Example"]) -> float:
    """Returns the share of texts that equal the answer, ignoring outer white space."""
    pairs = zip(texts, examples, strict=True)
    matches = [text.strip() == example.answer.strip() for text, example in pairs]
    return sum(matches) / len(matches)
