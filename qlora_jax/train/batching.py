"""Batches, packed or padded, from an iterator with a small state."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .batch import Batch, collate, part_of
from .packing import Packs, Singles
from .records import Row
from .widths import MOST, choose_widths, round_up

if TYPE_CHECKING:
    import grain


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    num_epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> "grain.DatasetIterator[Batch]":
    """Makes batches to train on.

    Each row comes once in each epoch, in an order that depends on `seed` and the epoch
    alone. The last rows of an epoch share a batch with the first ones of the next; one
    batch, among the last, is filled up with rows that do not count. All batches
    together have at most eight shapes.

    With `packing`, several sequences share a row, of at most `max_length` tokens: best
    fit, the longest first, over the whole epoch. Otherwise sequences of similar length
    share a batch.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch, on all processes together.
        max_length: The most tokens of a row.
        seed: What the order depends on.
        packing: Whether sequences share a row.
        num_epochs: How often each row comes; without an end where it is None.
        shard: Which part of each batch this process gets, and of how many.

    Returns:
        A Grain iterator. `get_state()` says where it is, as a small dict of JSON, and
        `set_state` goes there.

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
    _check(rows, batch_size, max_length)
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"`num_epochs` must be positive. Got {num_epochs}.")
    index, count = shard
    if not 0 <= index < count or batch_size % count:
        raise ValueError(
            f"`shard` must be a place, and a number of processes that divides the "
            f"{batch_size} rows of a batch. Got {shard}."
        )
    if packing:
        lengths = np.array([len(row.ids) for row in rows])
        order = Packs(lengths, max_length, seed, num_epochs)
        shapes = _Packed(order.longest)
    else:
        shapes = _Padded(rows)
        order = Singles(shapes.widths, batch_size, seed, num_epochs)
    source = _Source(rows, order, shapes, batch_size, shard)
    # One thread makes batches ahead: they are cheap.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int
) -> list[Batch]:
    """Makes batches that have each row once, in order.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch; the last is filled up with rows that do not count.
        max_length: The most tokens of a row.

    Returns:
        The batches. They have at most eight shapes.

    Raises:
        ValueError: If there are no rows, or an argument is out of its range.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> rows = [Row(ids, ids, f"valid.jsonl:{line}") for line in (1, 2, 3)]
        >>> found = eval_batches(rows, batch_size=2, max_length=16)
        >>> [batch.num_tokens for batch in found]
        [10, 5]
    """
    _check(rows, batch_size, max_length)
    shapes = _Padded(rows)
    groups = [[row] for row in rows]
    starts = range(0, len(rows), batch_size)
    return [shapes.batch(groups[i : i + batch_size], batch_size) for i in starts]


def _check(rows: Sequence[Row], batch_size: int, max_length: int) -> None:
    if not rows:
        raise ValueError("`rows` must have a row. Got none.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive. Got {batch_size}.")
    if long := [row.place for row in rows if len(row.ids) > max_length]:
        raise ValueError(
            f"rows must have at most {max_length} tokens. More have {long[:10]}."
        )


class _Padded:
    """Shapes of batches of one sequence a row.

    Each width has one number of selected places, the largest that its rows need.
    """

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
    """Shapes of batches of packed rows: one width, few numbers of selected places."""

    def __init__(self, longest: int):
        self.width = int(round_up(longest))
        self.step = int(round_up(-(-self.width // MOST)))

    def batch(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        most = max(sum(row.num_trained for row in group) for group in groups)
        return collate(groups, size, self.width, int(round_up(most, self.step)))


class _Source:
    """Batches by number, as Grain reads them."""

    def __init__(
        self,
        rows: Sequence[Row],
        order: Packs | Singles,
        shapes: _Packed | _Padded,
        batch_size: int,
        shard: tuple[int, int],
    ):
        self.rows, self.order, self.shapes = rows, order, shapes
        self.size, self.shard = batch_size, shard

    def __len__(self) -> int:
        count = self.order.count
        return sys.maxsize if count is None else -(-count // self.size)

    def __getitem__(self, index: int) -> Batch:
        groups = [
            [self.rows[i] for i in group]
            for group in self.order.batch(index, self.size)
        ]
        return part_of(self.shapes.batch(groups, self.size), self.shard)
