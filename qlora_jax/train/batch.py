"""Arrays of one step."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .records import IGNORED, Row


class Batch(NamedTuple):
    """Arrays of one step.

    Attributes:
        ids: Tokens, int32 `[B, T]`, padded on the right.
        segment_ids: Which sequence of its row a token belongs to, int32 `[B, T]`: 1, 2,
            ...; 0 for padding.
        positions: The place of each token in its sequence, int32 `[B, T]`. Those of
            padding count up too.
        select: Places whose next token is trained, int32 `[B, P]`.
        targets: That next token, int32 `[B, P]`.
        weights: 1 for such a token, 0 for filling, float32 `[B, P]`.

    Example:
        >>> from qlora_jax.train import eval_batches
        >>> row = Row(np.array([5, 6, 7]), np.array([-100, 6, 7]), "train.jsonl:1")
        >>> [batch] = eval_batches([row], batch_size=1, max_length=8)
        >>> batch.select[0, :2], batch.targets[0, :2], batch.num_trained
        (array([0, 1], dtype=int32), array([6, 7], dtype=int32), 2)
    """

    ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    select: np.ndarray
    targets: np.ndarray
    weights: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(np.count_nonzero(self.segment_ids))

    @property
    def num_trained(self) -> int:
        """Tokens that count."""
        return int(np.count_nonzero(self.weights))


def collate(
    groups: Sequence[Sequence[Row]], size: int, width: int, places: int
) -> Batch:
    """Puts groups of sequences into the rows of one batch.

    Args:
        groups: The sequences of each row.
        size: Rows of the batch; those without a group are padding.
        width: Tokens of a row.
        places: Selected places of a row.
    """
    ids, segments, positions = np.zeros((3, size, width), np.int32)
    select, targets = np.zeros((2, size, places), np.int32)
    weights = np.zeros((size, places), np.float32)
    positions[len(groups) :] = np.arange(width)
    for i, group in enumerate(groups):
        start, filled = 0, 0
        for segment, row in enumerate(group, 1):
            here = slice(start, start + len(row.ids))
            ids[i, here], segments[i, here] = row.ids, segment
            positions[i, here] = np.arange(len(row.ids))
            (chosen,) = np.nonzero(row.labels[1:] != IGNORED)
            there = slice(filled, filled + len(chosen))
            select[i, there] = start + chosen
            targets[i, there] = row.labels[1:][chosen]
            weights[i, there] = 1
            start, filled = here.stop, there.stop
        positions[i, start:] = np.arange(width - start)
    return Batch(ids, segments, positions, select, targets, weights)


def part_of(batch: Batch, shard: tuple[int, int]) -> Batch:
    """Returns the rows of one process, by its place and how many there are."""
    index, count = shard
    size = len(batch.ids) // count
    return Batch(*(x[index * size : (index + 1) * size] for x in batch))
