"""Batches, packed or padded, from an iterator with a small state."""

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .encode import IGNORED, Row
from .lines import Streamed
from .ordering import MOST, Alike, Packs, Shuffled, choose_widths, round_up

if TYPE_CHECKING:
    import grain

# The most batches of a mixture that are sorted by length at once: its rows are found
# one by one, which takes long.
_WINDOW = 512


class Batch(NamedTuple):
    """Arrays of one step.

    Attributes:
        ids: Tokens, int32 `[B, T]`, padded on the right.
        segment_ids: The sequence in its row of each token, int32 `[B, T]`: 1, 2, ...; 0
            for padding.
        positions: Each token's position in its sequence or in padding, int32 `[B, T]`.
        select: Indices into T whose next token is trained, int32 `[B, P]`.
        targets: That next token, int32 `[B, P]`.
        weights: 1 for a trained token, 0 for padding, float32 `[B, P]`. Of preferences,
            those of good answers alone.
        answers: For preferences: for each of the S sequences of a row, 1 for the
            tokens of a good answer, -1 for those of another one, 0 for others, float32
            `[B, S, P]`; else None. Sequences come in twos: the chosen answer and the
            rejected one; or an answer with a label, and that of another row to the same
            prompt.

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
    answers: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens, without padding."""
        return int(np.count_nonzero(self.segment_ids))

    @property
    def num_trained(self) -> int:
        """The number of trained tokens."""
        trained = self.weights if self.answers is None else self.answers
        return int(np.count_nonzero(trained))


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    num_epochs: int | None = None,
    mix: Sequence[tuple[int, float]] = (),
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
        mix: For several data sets: how many rows each has, one after the other in
            `rows`, and its weight: its share of the rows, or with `packing` of the
            rows of batches, within a percent. An epoch ends before one of them would
            begin again.

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
    source = _Source(rows, batch_size, max_length, packing, seed, num_epochs, mix)
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
    batch = lambda i: source.shapes.batch(groups[i : i + batch_size], batch_size)
    return [batch(i) for i in range(0, len(rows), batch_size)]


class _Padded:
    """Batch shapes of one sequence a row: each width has one number of places."""

    def __init__(
        self, rows: Sequence[Row], sizes: tuple[np.ndarray, ...], max_length: int
    ):
        self.max_length = max_length
        lengths, trained = sizes
        self.choices = choose_widths(lengths)
        if _has_label(rows[0]):  # an answer to another prompt may be longer
            prompt = max(row.start for row in rows)
            answer = max(len(row.ids) - row.start for row in rows)
            widest = int(round_up(min(prompt + answer, max_length)))
            self.choices = np.union1d(self.choices, [max(widest, self.choices[-1])])
        self.widths = self.choices[np.searchsorted(self.choices, lengths)]
        self.places = {
            int(width): int(round_up(trained[self.widths <= width].max()))
            for width in self.choices
        }

    def batch(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        rows = self._sequences([row for [row] in groups])
        longest = max(len(row.ids) for row in rows)
        width = int(self.choices[np.searchsorted(self.choices, longest)])
        size = size * len(rows) // len(groups)  # a pair has two rows of a batch
        places, sequences = self.places[width], int(rows[0].label is not None)
        return collate([[row] for row in rows], size, width, places, sequences)

    def _sequences(self, rows: list[Row]) -> list[Row]:
        if not _has_label(rows[0]):
            return [one for row in rows for one in row.sequences]
        # As TRL does: each prompt with the answer of the row before it.
        others = map(self._other, rows, rows[-1:] + rows[:-1])
        return [one for two in zip(rows, others, strict=True) for one in two]

    def _other(self, row: Row, before: Row) -> Row:
        join = lambda own, new: np.concatenate([own[: row.start], new[before.start :]])
        labels = join(np.full_like(row.ids, IGNORED), before.labels)
        new = row._replace(ids=join(row.ids, before.ids), labels=labels, label=False)
        return new.truncated(self.max_length)


def _sizes(rows: Sequence[Row], join: Callable[..., int]) -> tuple[np.ndarray, ...]:
    """Returns the lengths of rows, and the most trained tokens of their sequences."""
    if isinstance(rows, Streamed):
        return tuple(rows.sizes)
    lengths = [join(len(one.ids) for one in row.sequences) for row in rows]
    trained = [max(one.num_trained for one in row.sequences) for row in rows]
    return np.array(lengths), np.array(trained)


def _has_label(row: Row) -> bool:
    """Whether a row is an answer by itself."""
    return row.label is not None and row.rejected is None


class _Packed:
    """Batch shapes of packed rows: one width, few numbers of selected places."""

    def __init__(self, longest: int, sequences: int):
        self.sequences, self.width = sequences, int(round_up(longest))
        self.step = int(round_up(-(-self.width // MOST)))

    def batch(self, groups: Sequence[Sequence[Row]], size: int) -> Batch:
        rows = [[one for row in group for one in row.sequences] for group in groups]
        most = max(sum(row.num_trained for row in group) for group in rows)
        places = int(round_up(most, self.step))
        return collate(rows, size, self.width, places, self.sequences)


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
        mix: Sequence[tuple[int, float]] = (),
    ):
        if not rows:
            raise ValueError("`rows` must have a row. Got none.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive. Got {batch_size}.")
        # Where sequences share a row, those of a pair do.
        lengths, trained = _sizes(rows, sum if packing else max)
        if long := [rows[i].place for i in np.flatnonzero(lengths > max_length)[:10]]:
            both = ", the two answers of a pair together" * bool(rows[0].rejected)
            raise ValueError(
                f"rows must have at most {max_length} tokens{both * packing}. More "
                f"have {long}."
            )
        if packing and _has_label(rows[0]):
            raise ValueError("`packing` must be false for answers with a label.")
        counts, weights = zip(*mix, strict=True) if mix else ((len(rows),), (1.0,))
        if sum(counts) != len(rows) or min(counts) < 1 or min(weights) <= 0:
            raise ValueError(
                f"`mix` must have the counts of all {len(rows)} rows, and positive "
                f"weights. Got {mix}."
            )
        self.rows, self.size = rows, batch_size
        self.shapes: _Packed | _Padded
        parts: list[Any] = []
        bounds = itertools.pairwise(np.cumsum([0, *counts]).tolist())
        for number, (first, last) in enumerate(bounds, seed):
            part = lengths[first:last]
            order = Shuffled(len(part), number, first)
            parts.append(Packs(part, max_length, number, first) if packing else order)
        epochs = [p.epoch / w for p, w in zip(parts, weights, strict=True)]
        self.count = num_epochs and num_epochs * max(1, int(min(epochs) * sum(weights)))
        self.order: Any = parts[0]
        window = max(len(rows) // batch_size, 1)  # an epoch's full batches
        if mix:
            mixture = importlib.import_module("grain").MapDataset
            self.order = mixture.mix([*map(mixture.source, parts)], weights)
            window = min(window, _WINDOW)
        if packing:
            most = max(part.most for part in parts) * (rows[0].label is not None)
            self.shapes = _Packed(max(part.longest for part in parts), 2 * most)
        else:
            self.shapes = _Padded(rows, (lengths, trained), max_length)
            sizes = batch_size, window, self.count
            self.order = Alike(self.order, self.shapes.widths, *sizes, seed)

    def __len__(self) -> int:
        return sys.maxsize if self.count is None else -(-self.count // self.size)

    def __getitem__(self, index: int) -> Batch:
        if isinstance(self.order, Alike):
            chosen = self.order.batch(index)
        else:
            stop = min((index + 1) * self.size, self.count or sys.maxsize)
            chosen = [self.order[i] for i in range(index * self.size, stop)]
        groups = [[self.rows[i] for i in group] for group in chosen]
        return self.shapes.batch(groups, self.size)


def collate(
    groups: Sequence[Sequence[Row]],
    size: int,
    width: int,
    places: int,
    sequences: int = 0,
) -> Batch:
    """Returns a batch of `size` rows; each group of sequences fills one."""
    ids, segments, positions = np.zeros((3, size, width), np.int32)
    select, targets = np.zeros((2, size, places), np.int32)
    weights = np.zeros((size, places), np.float32)
    answers = np.zeros((size, sequences, places), np.float32)
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
            weights[i, there] = row.label is not False
            if row.label is not None:
                sign = 1 if row.label else -1
                answers[i, segment - 1, there] = sign * (chosen + 1 >= row.start)
            start, filled = here.stop, there.stop
        positions[i, start:] = np.arange(width - start)
    arrays = ids, segments, positions, select, targets, weights
    return Batch(*arrays, answers if sequences else None)
