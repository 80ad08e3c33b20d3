"""Chooses the rows of each batch, and the widths of batches."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

MULTIPLE = 8  # of tokens
MOST = 8  # widths
_PADDING = 0.05  # the share of padding that is not worth another program


def round_up(lengths: np.ndarray | int, multiple: int = MULTIPLE) -> np.ndarray:
    """Rounds up to a multiple, at least one."""
    return np.maximum(-(-np.asarray(lengths) // multiple), 1) * multiple


def choose_widths(lengths: np.ndarray) -> np.ndarray:
    """Returns the fewest widths, at most eight, that leave little padding."""
    widths, counts = np.unique(round_up(lengths), return_counts=True)
    total = lengths.sum()
    upto = np.concatenate([[0], np.cumsum(counts)])
    # Dynamic programming over the rounded lengths, for one more width each time.
    # cost[j]: the least padded tokens of the sequences up to width j, by `number` of
    # widths of which j is the last; before[number][j]: the width before it, from 1.
    cost = upto[1:] * widths
    before = [np.zeros(len(widths), int)]
    while cost[-1] * (1 - _PADDING) > total and len(before) < min(MOST, len(widths)):
        so_far = np.concatenate([[np.inf], cost])
        new, chosen = np.empty(len(widths)), np.zeros(len(widths), int)
        for j, width in enumerate(widths):
            candidates = so_far[: j + 1] + (upto[j + 1] - upto[: j + 1]) * width
            chosen[j] = int(candidates.argmin())
            new[j] = candidates[chosen[j]]
        cost, before = new, [*before, chosen]
    found, j = [], len(widths)
    for chosen in reversed(before):
        found.append(int(widths[j - 1]))
        j = int(chosen[j - 1])
    return np.array(found[::-1])


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs lengths, given in falling order; returns the indices of each row.

    Best-fit decreasing uses at most 11/9 of the fewest rows, plus 4: Johnson et al.,
    "Worst-case performance bounds for simple one-dimensional packing algorithms", 1974.
    """
    packed: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    has_rows = 0  # bit r is set where rows have r tokens of room
    for index, length in enumerate(lengths):
        fitting = has_rows >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                has_rows ^= 1 << room
        else:
            room, row = capacity, len(packed)
            packed.append([])
        packed[row].append(index)
        rows_with[room - length].append(row)
        has_rows |= 1 << (room - length)
    return packed


class Shuffled:
    """Rows one at a time, in an order without an end: a new one each epoch."""

    def __init__(self, count: int, seed: int, first: int = 0):
        """Rows are numbered from `first`."""
        self.epoch = count
        shuffle = lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
        self._order = functools.lru_cache(2)(lambda epoch: first + shuffle(epoch))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.epoch)
        return self._order(epoch)[place]


class Packs:
    """Several rows that share one each, likewise; an epoch has each row once."""

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int, first: int = 0):
        # The lengths that share a row are the same in each epoch, so all have as many
        # rows. Sequences of equal length change places.
        self._lengths, self._seed, self._first = lengths, seed, first
        falling = -np.sort(-lengths)
        self._packed = pack_lengths(falling.tolist(), capacity)
        self.longest = max(int(falling[row].sum()) for row in self._packed)
        self.most = max(map(len, self._packed))  # sequences of a row
        self.epoch = len(self._packed)
        self._order = functools.lru_cache(2)(self._shuffled)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.epoch)
        order, rows = self._order(epoch)
        return order[self._packed[rows[place]]]

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = rng.permutation(len(self._lengths))
        order = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
        return self._first + order, rng.permutation(self.epoch)


class Alike:
    """Batches of rows of similar length, from an order of single rows."""

    def __init__(
        self,
        order: Any,
        widths: np.ndarray,
        size: int,
        window: int,
        count: int | None,
        seed: int,
    ):
        """`window` is in batches; `count` is that of all rows, None for no end."""
        self._order, self._widths, self._size = order, widths, size
        self._count, self._seed, self._window = count, seed, window
        self._cut = functools.lru_cache(2)(self._batches)

    def batch(self, index: int) -> list[np.ndarray]:
        """Returns the index of the sequence in each row of a batch."""
        # The order is cut into windows; a window is sorted by length, and its batches
        # shuffled.
        window, place = divmod(index, self._window)
        return [*self._cut(window)[place].reshape(-1, 1)]

    def _batches(self, window: int) -> list[np.ndarray]:
        size, start = self._size, window * self._window * self._size
        stop = min(start + self._window * size, self._count or sys.maxsize)
        chosen = np.array([self._order[i] for i in range(start, stop)])
        order = chosen[np.argsort(self._widths[chosen], kind="stable")]
        cut = [order[i : i + size] for i in range(0, len(order), size)]
        rng = np.random.default_rng([self._seed, window, 1])
        return [cut[i] for i in rng.permutation(len(cut))]
