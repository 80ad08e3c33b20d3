"""Batches, packed or padded, from an iterator with a small state."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .encode import IGNORED, Row
from .ordering import MOST, Packs, Singles, choose_widths, round_up

if TYPE_CHECKING:
    import grain


class Batch(NamedTuple):
    """Arrays of one step.

    Attributes:
        ids: Tokens, int32 `[B, T]`, padded on the right.
        segment_ids: The sequence in its row of each token, int32 `[B, T]`: 1, 2, ...; 0
            for padding.
        positions: Each token's position in its sequence or in padding, int32 `[B, T]`.
        select: Indices into T whose next token is trained, int32 `[B, P]`.
        targets: That next token, int32 `[B, P]`.
        weights: 1 for a trained token, 0 for padding, float32 `[B, P]`.

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
        """The number of tokens, without padding."""
        return int(np.count_nonzero(self.segment_ids))

    @property
    def num_trained(self) -> int:
        """The number of trained tokens."""
        return int(np.count_nonzero(self.weights))


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    num_epochs: int | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Returns batches to train on, a Grain iterator with a small state.

    Each row comes once in each epoch, in an order that depends only on `seed` and the
    epoch. The last rows of an epoch share a batch with the first ones of the next. One
    of the last batches is filled up with rows that do not count. All batches together
    have at most eight shapes.

    With `packing`, several sequences share a row of at most `max_length` tokens, by
    best-fit decreasing. Otherwise sequences of similar length share a batch.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch, all of which each process makes.
        max_length: The most tokens of a row.
        seed: Seed of the order.
        packing: Whether sequences share a row.
        num_epochs: How often each row comes; None for no end.

    Raises:
        ValueError: If there are no rows, or an argument is out of its range.
        ImportError: If Grain is not installed.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> rows = [Row(ids[:n], ids[:n], "rows.jsonl:1") for n in (5, 3, 2, 5)]
        >>> settings = dict(batch_size=2, max_length=16, seed=0, packing=True)
        >>> iterator = batches(rows, **settings)
        >>> next(iterator).ids.shape, iterator.get_state()
        ((2, 16), {'next_index': 1})
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches need: pip install 'qlora-jax[train]'") from error
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"`num_epochs` must be positive. Got {num_epochs}.")
    source = _Source(rows, batch_size, max_length, packing, seed, num_epochs)
    # One thread makes batches ahead: they are cheap.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, packing: bool = False
) -> list[Batch]:
    """Returns batches that have each row once, in order if not packed.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch; the last is filled up with rows that do not count.
        max_length: The most tokens of a row.
        packing: Whether sequences share a row, as in `batches`.

    Raises:
        ValueError: If there are no rows, or an argument is out of its range.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> rows = [Row(ids, ids, f"valid.jsonl:{line}") for line in (1, 2, 3)]
        >>> found = eval_batches(rows, batch_size=2, max_length=16)
        >>> [batch.num_tokens for batch in found]
        [10, 5]
    """
    source = _Source(rows, batch_size, max_length, packing)
    if packing:
        return [source[i] for i in range(len(source))]
    groups = [[row] for row in rows]
    starts = range(0, len(rows), batch_size)
    batch = lambda start: source.shapes.batch(groups[start:][:batch_size], batch_size)
    return [batch(start) for start in starts]


class _Padded:
    """Batch shapes of one sequence a row: each width has one number of places."""

    def __init__(self, rows: Sequence[Row]):
        lengths = np.array([len(row.ids) for row in rows])
        trained = np.array([row.num_trained for row in rows])
        self.choices = choose_widths(lengths)
        self.widths = self.choices[np.searchsorted(self.choices, lengths)]
        self.places = {
            int(width): int(round_up(trained[self.widths <= width].max()))
            for width in self.choices
        }

    def batch(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        longest = max(len(row.ids) for group in groups for row in group)
        width = int(self.choices[np.searchsorted(self.choices, longest)])
        return collate(groups, size, width, self.places[width])


class _Packed:
    """Batch shapes of packed rows: one width, few numbers of selected places."""

    def __init__(self, longest: int):
        self.width = int(round_up(longest))
        self.step = int(round_up(-(-self.width // MOST)))

    def batch(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        most = max(sum(row.num_trained for row in group) for group in groups)
        return collate(groups, size, self.width, int(round_up(most, self.step)))


class _Source:
    """Batches by index, as Grain reads them."""

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        max_length: int,
        packing: bool,
        seed: int = 0,
        num_epochs: int | None = 1,
    ):
        if not rows:
            raise ValueError("`rows` must have a row. Got none.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive. Got {batch_size}.")
        if long := [row.place for row in rows if len(row.ids) > max_length]:
            raise ValueError(
                f"rows must have at most {max_length} tokens. More have {long[:10]}."
            )
        self.rows, self.size = rows, batch_size
        self.order: Packs | Singles
        self.shapes: _Packed | _Padded
        if packing:
            lengths = np.array([len(row.ids) for row in rows])
            self.order = Packs(lengths, max_length, seed, num_epochs)
            self.shapes = _Packed(self.order.longest)
        else:
            self.shapes = _Padded(rows)
            self.order = Singles(self.shapes.widths, batch_size, seed, num_epochs)

    def __len__(self) -> int:
        count = self.order.count
        return sys.maxsize if count is None else -(-count // self.size)

    def __getitem__(self, index: int) -> Batch:
        chosen = self.order.batch(index, self.size)
        groups = [[self.rows[i] for i in group] for group in chosen]
        return self.shapes.batch(groups, self.size)


def collate(
    groups: Sequence[Sequence[Row]], size: int, width: int, places: int
) -> Batch:
    """Returns a batch of `size` rows; each group of sequences fills one."""
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
