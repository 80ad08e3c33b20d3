"""Best-fit packing of sequences into rows of one length."""

from collections.abc import Sequence

import numpy as np


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs sequences, the longest first, each where the least room is left.

    Best-fit decreasing uses at most 11/9 of the fewest rows, plus 4 (Johnson and
    others, "Worst-case performance bounds for simple one-dimensional packing
    algorithms", 1974).

    Args:
        lengths: How long the sequences are, in falling order.
        capacity: How many tokens a row has room for.

    Returns:
        For each row, the indices of its sequences.

    Example:
        >>> pack_lengths([6, 5, 3, 2], 8)
        [[0, 3], [1, 2]]
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


class Packs:
    """The packed rows of each epoch.

    Which lengths share a row depends on the lengths alone, so each epoch has as many
    rows. Which sequences of a length go where is drawn anew in each.

    Attributes:
        num_rows: How many rows an epoch has.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, seed: int):
        self.lengths, self.seed = lengths, seed
        falling = -np.sort(-lengths)
        self._packed = pack_lengths(falling.tolist(), capacity)
        self.num_rows = len(self._packed)
        self.longest = max(int(falling[row].sum()) for row in self._packed)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the sequences in a row of the endless stream of epochs."""
        epoch, place = divmod(index, self.num_rows)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shuffled = rng.permutation(len(self.lengths))
            order = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
            self._epoch = epoch, order, rng.permutation(self.num_rows)
        _, order, rows = self._epoch
        return order[self._packed[rows[place]]]


class Singles:
    """Rows of one sequence each, those of a batch of similar length.

    Each epoch orders the sequences anew. The stream of epochs is cut into windows of as
    many whole batches as an epoch fills; a window is sorted by length, cut into
    batches, and these are shuffled. Of `end` sequences, the last window has the rest.
    """

    def __init__(self, widths: np.ndarray, batch_size: int, seed: int, end: int | None):
        self.widths, self.size, self.seed, self.end = widths, batch_size, seed, end
        self.window = max(len(widths) // batch_size, 1) * batch_size
        self._orders: dict[int, np.ndarray] = {}
        self._cut: tuple[int, list[np.ndarray]] | None = None

    def batch(self, index: int) -> np.ndarray:
        """Returns the sequences of a batch."""
        window, place = divmod(index, self.window // self.size)
        if self._cut is None or self._cut[0] != window:
            self._cut = window, self._batches(window)
        return self._cut[1][place]

    def _batches(self, window: int) -> list[np.ndarray]:
        start = window * self.window
        stop = start + self.window
        if self.end is not None:
            stop = min(stop, self.end)
        chosen = np.array([self._sequence(i) for i in range(start, stop)])
        order = chosen[np.argsort(self.widths[chosen], kind="stable")]
        cut = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        rng = np.random.default_rng([self.seed, window, 1])
        return [cut[i] for i in rng.permutation(len(cut))]

    def _sequence(self, index: int) -> int:
        epoch, place = divmod(index, len(self.widths))
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, epoch])
            kept = {e: x for e, x in self._orders.items() if e == epoch - 1}
            self._orders = {**kept, epoch: rng.permutation(len(self.widths))}
        return int(self._orders[epoch][place])
