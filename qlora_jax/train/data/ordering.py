"""Chooses the rows of each batch, and the widths of batches."""

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

    def __init__(self, count: int, seed: int):
        self.epoch, self._seed = count, seed

    def take(self, places: np.ndarray) -> np.ndarray:
        """Returns the rows at rising places of the order."""
        first, last = places[0] // self.epoch, places[-1] // self.epoch
        rngs = [np.random.default_rng([self._seed, x]) for x in range(first, last + 1)]
        epochs = np.concatenate([rng.permutation(self.epoch) for rng in rngs])
        return epochs[places - first * self.epoch]


class Packs:
    """Several rows that share one each, likewise; an epoch has each row once."""

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int):
        # The lengths that share a row are the same in each epoch, so all have as many
        # rows. Sequences of equal length change places.
        self._lengths, self._seed = lengths, seed
        falling = -np.sort(-lengths)
        self._packed = pack_lengths(falling.tolist(), capacity)
        self.longest = max(int(falling[row].sum()) for row in self._packed)
        self.most = max(map(len, self._packed))  # sequences of a row
        self.epoch = len(self._packed)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def take(self, places: np.ndarray) -> list[np.ndarray]:
        """Returns the rows that share one at each place of the order."""
        return [self._row(place) for place in places.tolist()]

    def _row(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.epoch)
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, epoch])
            shuffled = rng.permutation(len(self._lengths))
            order = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]
            self._order = epoch, order, rng.permutation(self.epoch)
        _, order, rows = self._order
        return order[self._packed[rows[place]]]


class Mixed:
    """Several orders mixed by weights; an epoch ends before one would begin again."""

    def __init__(
        self,
        parts: Sequence[Shuffled | Packs],
        counts: Sequence[int],
        weights: Sequence[float],
        seed: int,
    ):
        """Rows of a part are numbered after the `counts` of those before it."""
        self._parts, self._seed = parts, seed
        self._firsts = np.cumsum([0, *counts[:-1]])
        shares = np.array(weights) / sum(weights)
        least = min(part.epoch / x for part, x in zip(parts, shares, strict=True))
        self.epoch = max(int(least), 1)
        # The parts change places in periods, in which each is a whole number of times:
        # its share within a percent.
        period = max(least, 100 / shares.min())
        self._times = (period * shares).astype(int)
        self._period: tuple[int, np.ndarray, np.ndarray] | None = None

    def take(self, places: np.ndarray) -> list[Any]:
        """Returns what the parts have at consecutive places of the mixed order."""
        found: list[Any] = [None] * len(places)
        size = self._times.sum()
        numbers, at = np.divmod(places, size)
        which, inner = np.zeros((2, len(places)), int)
        for number in range(numbers[0], numbers[-1] + 1):
            here = numbers == number
            which[here], inner[here] = (x[at[here]] for x in self._places(number))
        for part, order in enumerate(self._parts):
            (mine,) = np.nonzero(which == part)
            rows = order.take(inner[mine]) if len(mine) else []
            for place, row in zip(mine, rows, strict=True):
                found[place] = row + self._firsts[part]
        return found

    def _places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the part of each place of a period, and its place in the part."""
        if self._period is None or self._period[0] != number:
            rng = np.random.default_rng([self._seed, number, 2])
            which = rng.permutation(np.repeat(np.arange(len(self._times)), self._times))
            inner = np.empty_like(which)
            ranks = np.concatenate([*map(np.arange, self._times)])
            inner[np.argsort(which, kind="stable")] = ranks
            self._period = number, which, inner + number * self._times[which]
        return self._period[1:]


class Alike:
    """Batches of rows of similar length, from an order of single rows."""

    def __init__(
        self,
        order: Shuffled | Mixed,
        widths: np.ndarray,
        size: int,
        count: int | None,
        seed: int,
    ):
        """`count` is the number of rows in all; None for no end."""
        self._order, self._widths, self._size = order, widths, size
        self._count, self._seed = count, seed
        self._window = max(len(widths) // size, 1)  # in batches
        self._cut: tuple[int, list[np.ndarray]] | None = None

    def batch(self, index: int) -> list[np.ndarray]:
        """Returns the index of the sequence in each row of a batch."""
        # The order is cut into windows of an epoch's full batches; a window is sorted
        # by length, and its batches shuffled.
        window, place = divmod(index, self._window)
        if self._cut is None or self._cut[0] != window:
            self._cut = window, self._batches(window)
        return [*self._cut[1][place].reshape(-1, 1)]

    def _batches(self, window: int) -> list[np.ndarray]:
        size, start = self._size, window * self._window * self._size
        stop = start + self._window * size
        stop = stop if self._count is None else min(stop, self._count)
        chosen = np.asarray(self._order.take(np.arange(start, stop)))
        order = chosen[np.argsort(self._widths[chosen], kind="stable")]
        cut = [order[i : i + size] for i in range(0, len(order), size)]
        rng = np.random.default_rng([self._seed, window, 1])
        return [cut[i] for i in rng.permutation(len(cut))]
