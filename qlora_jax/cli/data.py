"""Batches of rows to score."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..train.data.encode import IGNORED, Row


class Batch(NamedTuple):
    """Rows padded on the right, `[B, T]`.

    Attributes:
        ids: Their tokens.
        labels: Their labels.
        is_token: False for padding.
    """

    ids: np.ndarray
    labels: np.ndarray
    is_token: np.ndarray


def batches(rows: Sequence[Row], max_tokens: int) -> Iterator[Batch]:
    """Yields the rows in batches of few different shapes, the longest last.

    Lengths are rounded up, to powers of two and three quarters of such, and batches are
    filled up with rows that do not count, so that few programs are compiled.

    Args:
        rows: The rows.
        max_tokens: The most tokens of a batch, with padding; a longer row is alone.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> [batch] = batches([Row(ids, ids, "rows.jsonl:1")] * 3, max_tokens=64)
        >>> batch.ids.shape, (batch.labels != IGNORED).sum()
        ((4, 16), np.int64(15))
    """
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(_rounded(len(row.ids)), []).append(row)
    for length, group in sorted(by_length.items()):
        size = min(max(max_tokens // length, 1), _power_of_two(len(group)))
        for start in range(0, len(group), size):
            ids = np.zeros((size, length), np.int32)
            labels = np.full((size, length), IGNORED, np.int32)
            is_token = np.zeros((size, length), bool)
            for place, row in enumerate(group[start : start + size]):
                ids[place, : len(row.ids)] = row.ids
                labels[place, : len(row.ids)] = row.labels
                is_token[place, : len(row.ids)] = True
            yield Batch(ids, labels, is_token)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _rounded(length: int) -> int:
    size = max(_power_of_two(length), 16)
    return size * 3 // 4 if length <= size * 3 // 4 and size > 16 else size
