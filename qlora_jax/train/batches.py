"""Batches of fixed shapes, packed or padded, from an iterator with a small state."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .encode import IGNORED, Row
from .packing import Packs, Singles

if TYPE_CHECKING:
    import grain

_MULTIPLE = 16  # of tokens
_WIDTHS = 8  # how many different widths, or numbers of selected places, there are


class Batch(NamedTuple):
    """Arrays of one step.

    Attributes:
        ids: Tokens, int32 `[B, T]`, padded on the right.
        segment_ids: Which sequence of its row a token belongs to, int32 `[B, T]`: 1, 2,
            ...; 0 for padding.
        positions: The place of each token in its sequence, int32 `[B, T]`.
        select: Places whose next token is trained, int32 `[B, P]`.
        targets: That next token, int32 `[B, P]`.
        weights: 1 for such a token, 0 for filling, float32 `[B, P]`.

    Example:
        >>> row = Row(np.array([5, 6, 7]), np.array([-100, 6, 7]), "")
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
    """Returns an iterator of training batches.

    An epoch has each row once, in an order that depends on `seed` and the epoch. Its
    last rows share a batch with the first ones of the next; only the very last batch
    is filled up with rows that do not count. All batches together have at most eight
    shapes.

    With `packing`, several sequences share a row of a batch, of at most `max_length`
    tokens: best-fit decreasing, over the whole epoch. Otherwise sequences of similar
    length share a batch.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch, on all processes together.
        max_length: The most tokens of a row.
        seed: What the order depends on.
        packing: Whether sequences share a row.
        num_epochs: How often each row comes; without an end where it is None.
        shard: Which part of each batch this process gets, and of how many.

    Returns:
        A Grain iterator. `get_state()` returns its place as a small dict of JSON, from
        which `set_state` goes on.

    Raises:
        ValueError: If there are no rows, or an argument is out of its range.
        ImportError: If Grain is not installed.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> rows = [Row(ids[:n], ids[:n], "") for n in (5, 3, 2, 5)]
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
            f"`shard` must be a place below a divisor of batch_size={batch_size}, and "
            f"that divisor. Got {shard}."
        )
    kind = _Packed if packing else _Unpacked
    source = kind(rows, batch_size, max_length, seed, num_epochs, shard)
    # One thread makes batches ahead: they are cheap.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int
) -> list[Batch]:
    """Returns batches that have each row once, in order.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: Rows of a batch; the last is filled up with rows that do not count.
        max_length: The most tokens of a row.

    Raises:
        ValueError: If there are no rows, or an argument is out of its range.

    Returns:
        The batches, padded to few widths.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> found = eval_batches([Row(ids, ids, "")] * 3, batch_size=2, max_length=16)
        >>> [batch.num_tokens for batch in found]
        [10, 5]
    """
    _check(rows, batch_size, max_length)
    shapes = _Shapes(rows)
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [shapes.collate([[row] for row in g], batch_size) for g in groups]


def _check(rows: Sequence[Row], batch_size: int, max_length: int) -> None:
    if not rows:
        raise ValueError("`rows` must have a row. Got none.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be positive. Got {batch_size}.")
    if long := [row.place for row in rows if len(row.ids) > max_length]:
        raise ValueError(
            f"rows must have at most {max_length} tokens. Got {long[:10]}."
        )


class _Shapes:
    """Widths of batches, and how many selected places a row of each width has."""

    def __init__(self, rows: Sequence[Row]):
        lengths = np.array([len(row.ids) for row in rows])
        trained = np.array([row.num_trained for row in rows])
        self.step = _step(int(lengths.max()))
        self.widths = _up(lengths, self.step)
        self.places = {
            int(width): int(_up(trained[self.widths <= width].max(), _MULTIPLE))
            for width in np.unique(self.widths)
        }

    def collate(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        longest = max(len(row.ids) for group in groups for row in group)
        width = int(_up(longest, self.step))
        return collate(groups, size, width, self.places[width])


class _Packed:
    """Batches of packed rows, by number."""

    def __init__(self, rows, batch_size, max_length, seed, num_epochs, shard):
        lengths = np.array([len(row.ids) for row in rows])
        self.rows, self.size, self.shard = rows, batch_size, shard
        self.packs = Packs(lengths, max_length, seed)
        self.width = int(_up(self.packs.longest, _MULTIPLE))
        self.step = _step(self.width)
        self.end = None if num_epochs is None else num_epochs * self.packs.num_rows

    def __len__(self) -> int:
        return sys.maxsize if self.end is None else -(-self.end // self.size)

    def __getitem__(self, index: int) -> Batch:
        start = index * self.size
        stop = (
            start + self.size if self.end is None else min(start + self.size, self.end)
        )
        groups = [[self.rows[j] for j in self.packs[i]] for i in range(start, stop)]
        most = max(sum(row.num_trained for row in group) for group in groups)
        places = min(int(_up(most, self.step)), self.width)
        return _part(collate(groups, self.size, self.width, places), self.shard)


class _Unpacked:
    """Batches of rows of similar length, by number."""

    def __init__(self, rows, batch_size, max_length, seed, num_epochs, shard):
        del max_length
        self.rows, self.size, self.shard = rows, batch_size, shard
        self.shapes = _Shapes(rows)
        self.end = None if num_epochs is None else num_epochs * len(rows)
        self.singles = Singles(self.shapes.widths, batch_size, seed, self.end)

    def __len__(self) -> int:
        return sys.maxsize if self.end is None else -(-self.end // self.size)

    def __getitem__(self, index: int) -> Batch:
        groups = [[self.rows[i]] for i in self.singles.batch(index)]
        return _part(self.shapes.collate(groups, self.size), self.shard)


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
    return Batch(ids, segments, positions, select, targets, weights)


def _part(batch: Batch, shard: tuple[int, int]) -> Batch:
    index, count = shard
    size = len(batch.ids) // count
    return Batch(*(x[index * size : (index + 1) * size] for x in batch))


def _step(longest: int) -> int:
    """Returns a step that rounds lengths up to at most eight different ones."""
    return int(_up(-(-longest // _WIDTHS), _MULTIPLE))


def _up(lengths, multiple: int):
    """Rounds up to a multiple, at least one."""
    return np.maximum(-(-lengths // multiple), 1) * multiple
