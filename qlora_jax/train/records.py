"""Rows of tokens, and prompts with their answers."""

from typing import NamedTuple

import numpy as np

IGNORED = -100  # the label of a token that does not count, as in PyTorch


class Row(NamedTuple):
    """One sequence.

    Attributes:
        ids: Its tokens, int32 `[T]`.
        labels: For each token, the id that the model should have predicted there, or
            -100 where it does not count; the first is predicted by none and never
            counts.
        place: Where it comes from, such as "train.jsonl:17".

    Example:
        >>> row = Row(np.array([3, 1, 2]), np.array([-100, 1, 2]), "train.jsonl:17")
        >>> row.num_trained
        2
    """

    ids: np.ndarray
    labels: np.ndarray
    place: str

    @property
    def num_trained(self) -> int:
        """How many tokens count."""
        return int((self.labels[1:] != IGNORED).sum())


class Example(NamedTuple):
    """A prompt and the right answer.

    Attributes:
        prompt: The tokens up to where the answer starts.
        answer: The text that the model should write.
        end_ids: The tokens that end an answer.

    Example:
        >>> Example([5, 6], "four", (2,)).answer
        'four'
    """

    prompt: list[int]
    answer: str
    end_ids: tuple[int, ...]
