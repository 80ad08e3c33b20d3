"""Generates answers to prompts, and scores them."""

from collections.abc import Mapping, Sequence
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
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    progress: bool = True,
) -> list[GeneratedAnswer]:
    """Returns the answer to each prompt, which are tokens."""
    answers: dict[int, GeneratedAnswer] = {}  # by the index of the prompt
    end_ids = tokenizer.end_ids
    # Prompts of similar length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_rows = min(batch_size, len(order))
    # None hides the bar unless stderr is a terminal.
    disable = None if progress else True
    with tqdm(
        desc="answering", unit=" prompts", disable=disable, total=len(order)
    ) as bar:
        for start in range(0, len(order), num_rows):
            indices = order[start : start + num_rows]
            rows = [prompts[index] for index in indices]
            generated = generate(
                model,
                variables,
                # The last batch repeats a prompt until it has the size of the others,
                # which saves compiling another program.
                rows + rows[-1:] * (num_rows - len(rows)),
                max_new_tokens=max_new_tokens,
                eos_ids=end_ids,
                sampling=sampling,
                # Each batch gets a key of its own, from the index of its first prompt.
                key=key if key is None else jax.random.fold_in(key, indices[0]),
            )
            new_rows = np.asarray(generated).tolist()
            for index, ids in zip(indices, new_rows, strict=False):  # drops repetitions
                end = next((i for i, x in enumerate(ids) if x in end_ids), None)
                new_tokens = len(ids) if end is None else end + 1
                text = tokenizer.decode(ids[:end])
                answers[index] = GeneratedAnswer(text, new_tokens, end is not None)
            bar.update(len(indices))
    return [answers[index] for index in range(len(prompts))]


def exact_match(texts: Sequence[str], examples: Sequence["Example"]) -> float:
    """Returns the share of texts that equal the answer, ignoring outer white space."""
    pairs = zip(texts, examples, strict=True)
    matches = [text.strip() == example.answer.strip() for text, example in pairs]
    return sum(matches) / len(matches)
