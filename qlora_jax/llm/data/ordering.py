"""Orders rows, packs them, and chooses the widths of batches."""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

MULTIPLE = 8  # widths are multiples of this number of tokens
MAX_WIDTHS = 8  # each width is compiled as a program of its own
_PADDING = 0.05  # no more widths are added once at most this share is padding


def round_up(lengths: np.ndarray | int, multiple: int = MULTIPLE) -> np.ndarray:
    """Rounds up to a positive multiple."""
    return np.maximum(-(-np.asarray(lengths) // multiple), 1) * multiple


def choose_widths(lengths: np.ndarray) -> np.ndarray:
    """Returns the fewest widths, at most eight, that leave little padding."""
    # Dynamic programming. The candidates, `widths`, are the distinct rounded lengths.
    # cost_n[j] is the number of tokens, with padding, of all sequences that are no
    # longer than widths[j], if n widths are used and widths[j] is the largest of them:
    #     cost_n[j] = min over i <= j of cost_(n-1)[i - 1] + count(i to j) * widths[j]
    # Here, i - 1 is the index of the second largest width. The count(i to j) sequences
    # that are longer than it, and no longer than widths[j], are padded to widths[j].
    widths, counts = np.unique(round_up(lengths), return_counts=True)
    num_tokens = lengths.sum()
    # For each j: the number of sequences that are narrower than widths[j].
    num_narrower = np.concatenate([[0], np.cumsum(counts)])
    cost = num_narrower[1:] * widths  # one width for all
    # For each n, and each j: the best i, or 0 if there is no second largest width.
    best_starts = [np.zeros(len(widths), int)]
    max_widths = min(MAX_WIDTHS, len(widths))
    while cost[-1] * (1 - _PADDING) > num_tokens and len(best_starts) < max_widths:
        old_cost = np.concatenate([[np.inf], cost])  # at i: cost_(n-1)[i - 1]
        cost, starts = np.empty(len(widths)), np.zeros(len(widths), int)
        for j, width in enumerate(widths):
            counts_to_j = num_narrower[j + 1] - num_narrower[: j + 1]  # count(i to j)
            candidates = old_cost[: j + 1] + counts_to_j * width  # for each i
            starts[j] = int(candidates.argmin())
            cost[j] = candidates[starts[j]]
        best_starts.append(starts)
    # Walk back from the largest width.
    chosen, j = [], len(widths) - 1
    for starts in reversed(best_starts):
        chosen.append(int(widths[j]))
        j = int(starts[j]) - 1
    return np.array(chosen[::-1])


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs lengths that are sorted from long to short. Returns the indices by pack."""
    # Best-fit decreasing needs at most 11/9 times the minimal number of packs, plus 4:
    # Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional
    # packing algorithms".
    packs: list[list[int]] = []
    packs_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set if a pack has room for exactly r tokens. The best fit is then found
    # without a search: it is the lowest bit that is set at or above `length`.
    room_bits = 0
    for index, length in enumerate(lengths):
        fitting = room_bits >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                room_bits ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        packs_with_room[room - length].append(pack)
        room_bits |= 1 << (room - length)
    return packs


class Order(Sequence[Any]):
    """An endless sequence of indices of rows, or of packs, in a new order each epoch.

    Attributes:
        packs: The packs of an epoch, as lists of ranks. The longest row has rank 0.
            Empty without a capacity.
        longest: The number of tokens of the longest pack.
        epoch_size: The number of rows or packs in an epoch, which has each row once.
    """

    def __init__(
        self, lengths: np.ndarray, seed: int, first: int, capacity: int | None
    ):
        """Orders rows of the given lengths, whose indices start at `first`."""
        self._lengths, self._seed, self._first = lengths, seed, first
        self.packs: list[list[int]] = []
        if capacity is not None:
            # The lengths are packed only once, so that all epochs have the same number
            # of packs. Between epochs, only rows of equal length swap places.
            descending = -np.sort(-lengths)
            self.packs = pack_lengths(descending.tolist(), capacity)
            self.longest = max(int(descending[pack].sum()) for pack in self.packs)
        self.epoch_size = len(self.packs) or len(lengths)
        # Cache two epochs, since a batch may have rows of two. A decorator on the
        # method would keep this object alive.
        self._permutation = functools.lru_cache(2)(self._shuffle)

    def __len__(self) -> int:
        return sys.maxsize

    # Slices are not supported.
    def __getitem__(self, index: Any) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        epoch, position = divmod(index, self.epoch_size)
        indices, pack_order = self._permutation(epoch)
        return indices[self.packs[pack_order[position]] if self.packs else position]

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng([self._seed, epoch])
        indices = generator.permutation(len(self._lengths))
        if self.packs:  # from long to short, with ties in random order
            indices = indices[np.argsort(-self._lengths[indices], kind="stable")]
        return self._first + indices, generator.permutation(len(self.packs))
