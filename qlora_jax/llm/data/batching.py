"""Batches, packed or padded. The only state of their iterator is an index."""

import fractions
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .encode import IGNORED, Row
from .ordering import MAX_WIDTHS, Order, choose_widths, round_up

if TYPE_CHECKING:
    import grain

# For mixtures without packing: the largest number of batches whose rows are sorted by
# length together. It is limited since finding each row of a mixture is slow.
_MAX_WINDOW = 512


class Batch(NamedTuple):
    """The arrays of one batch.

    Attributes:
        ids: The tokens, int32 `[B, T]`, padded on the right.
        segment_ids: For each token, the number of its sequence in the row, from 1 on;
            0 for padding, int32 `[B, T]`.
        positions: The position of each token in its sequence, or in the padding at the
            end of the row, int32 `[B, T]`.
        select: The index in T of each position from which a target is predicted, which
            is the position before the target, int32 `[B, P]`.
        targets: The ids of the targets, int32 `[B, P]`.
        weights: 1 for a target, 0 for padding, float32 `[B, P]`. For preferences, only
            targets in sequences with a good completion have 1.
        answers: Only for preferences, otherwise None. Shows which targets are in the
            completion of each of the S sequences of a row: 1 if the completion is good,
            -1 if it is bad, and 0 for all other targets, float32 `[B, S, P]`. Sequences
            come in twos: a chosen completion and its rejected one; or, for KTO, a
            labelled completion and the same prompt with the completion of another row.
            The two are next to each other in a row if batches are packed, and otherwise
            in consecutive rows.

    Example:
        >>> from qlora_jax.llm.data import eval_batches
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
        """The number of target tokens."""
        targets = self.weights if self.answers is None else self.answers
        return int(np.count_nonzero(targets))


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    packing: bool,
    num_epochs: float | None = None,
    mix: Sequence[tuple[int, float]] = (),
) -> "grain.DatasetIterator[Batch]":
    """Returns training batches, as a Grain iterator whose only state is an index.

    Each epoch has each row once, in an order that depends only on `seed` and the epoch.
    The last rows of an epoch share a batch with the first rows of the next one. If the
    number of rows in all epochs is not a multiple of `batch_size`, one of the last
    batches has padding rows. Batches have at most eight shapes, and nine for KTO.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: The number of rows per batch, in all processes together.
        max_length: The largest number of tokens of a row.
        seed: The seed of the order.
        packing: Whether several sequences share a row of at most `max_length` tokens,
            by best-fit decreasing. If not, sequences of similar length share a batch.
        num_epochs: The number of epochs, which may be a fraction, or None for an
            endless iterator.
        mix: For several data sets: the number of rows and the weight of each, in the
            order of `rows`. The share of a data set in the rows of the batches (which
            are packs with `packing`) is proportional to its weight, to within a
            percent. An epoch ends before any data set would start again.

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
    source = BatchSource(rows, batch_size, max_length, packing, seed, num_epochs, mix)
    # One thread prepares batches in advance, which is enough since they are cheap.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, packing: bool = False
) -> list[Batch]:
    """Returns batches that have each row once, in order if not packed.

    Args:
        rows: The rows, of at most `max_length` tokens.
        batch_size: The number of rows per batch. The last one is padded.
        max_length: The largest number of tokens of a row.
        packing: Whether sequences share a row, as in `batches`.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> rows = [Row(ids, ids, f"valid.jsonl:{line}") for line in (1, 2, 3)]
        >>> valid = eval_batches(rows, batch_size=2, max_length=16)
        >>> [batch.num_tokens for batch in valid]
        [10, 5]
    """
    source = BatchSource(rows, batch_size, max_length, packing)
    if packing:
        return [source[i] for i in range(len(source))]
    rows, starts = [*rows], range(0, len(rows), batch_size)
    return [source.pad(rows[i : i + batch_size]) for i in starts]


class BatchSource:
    """Batches by index, as Grain reads them.

    Attributes:
        epoch_size: The number of rows, or of packs, in an epoch.
        count: Their number in all epochs, or None if epochs never end.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        max_length: int,
        packing: bool,
        seed: int = 0,
        num_epochs: float | None = 1,
        mix: Sequence[tuple[int, float]] = (),
    ):
        if not rows:
            raise ValueError("`rows` must have a row. Got none.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive. Got {batch_size}.")
        if num_epochs is not None and num_epochs <= 0:
            raise ValueError(f"`num_epochs` must be positive. Got {num_epochs}.")
        # With packing, both sequences of a pair are in the same row.
        join = sum if packing else max
        lengths = np.array([join(len(x.ids) for x in row.sequences) for row in rows])
        if long := [rows[i].place for i in np.flatnonzero(lengths > max_length)[:10]]:
            is_joint = packing and rows[0].rejected is not None
            scope = ", both answers of a pair together" if is_joint else ""
            raise ValueError(
                f"rows must have at most {max_length} tokens{scope}. Got {long}."
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.max_length, self.packing = max_length, packing
        self.is_preference = rows[0].label is not None
        # Whether rows are single completions with a label, and not pairs.
        self.is_labelled = self.is_preference and rows[0].rejected is None
        if packing and self.is_labelled:
            raise ValueError("`packing` must be false for answers with a label.")
        orders = self._choose_orders(lengths, mix, num_epochs)
        if packing:
            most_rows = max(len(pack) for x in orders for pack in x.packs)
            self.num_sequences = 2 * most_rows if self.is_preference else 0
            self.width = int(round_up(max(x.longest for x in orders)))
            # The number of targets of a batch is rounded up to a multiple of this, so
            # that batches have few shapes.
            self.target_multiple = int(round_up(-(-self.width // MAX_WIDTHS)))
        else:
            self._choose_widths(lengths)

    def _choose_orders(self, lengths, mix, num_epochs) -> list[Order]:
        # Stores the order of all rows, or packs of rows, and the sizes of an epoch and
        # of a window. Returns the orders of the data sets that are mixed in it, none of
        # which depends on the other data sets.
        num_rows = len(self.rows)
        counts, weights = zip(*mix, strict=True) if mix else ((num_rows,), (1.0,))
        if sum(counts) != num_rows or min(counts) < 1 or min(weights) <= 0:
            raise ValueError(
                f"`mix` must have the counts of all {num_rows} rows, and positive "
                f"weights. Got {mix}."
            )
        capacity = self.max_length if self.packing else None
        bounds = itertools.pairwise(np.cumsum([0, *counts]).tolist())
        orders = [
            Order(lengths[first:last], self.seed + i, first, capacity)
            for i, (first, last) in enumerate(bounds)
        ]
        # The data set with the smallest ratio runs out first. An epoch ends just before
        # this data set would start again. Rounding removes float errors: the weights
        # 0.7, 0.2 and 0.1 add up to less than 1.
        ratios = [x.epoch_size / w for x, w in zip(orders, weights, strict=True)]
        self.epoch_size = max(1, int(round(min(ratios) * sum(weights), 6)))
        self.count = None
        if num_epochs is not None:
            # As a fraction, because 50 * 1.1 in floats is a little more than 55.
            self.count = math.ceil(
                fractions.Fraction(str(num_epochs)) * self.epoch_size
            )
        self.order: Sequence[Any] = orders[0]
        # How many batches are sorted by length together (see `_cut_window`): an epoch.
        self.window_size = max(num_rows // self.batch_size, 1)
        if mix:
            dataset = importlib.import_module("grain").MapDataset
            self.order = dataset.mix([*map(dataset.source, orders)], weights)
            self.window_size = min(self.window_size, _MAX_WINDOW)
        self._window_batches = functools.lru_cache(2)(self._cut_window)
        return orders

    def _choose_widths(self, lengths: np.ndarray) -> None:
        self.widths = choose_widths(lengths)
        pairs = (row.sequences for row in self.rows)
        num_targets = np.array([max(x.num_trained for x in pair) for pair in pairs])
        if self.is_labelled:
            # The prompt of a row is combined with the completion of another one, which
            # may be longer than the completion of the row.
            prompt = max(row.start for row in self.rows)
            rows = [row.uncut or row for row in self.rows]
            completion = max(len(row.ids) - row.start for row in rows)
            widest = int(round_up(min(prompt + completion, self.max_length)))
            self.widths = np.union1d(self.widths, [max(widest, self.widths[-1])])
            # After the prompt of another row, the first token of a row without a prompt
            # is a target, too.
            labels = [row.labels[row.start :] for row in rows]
            sizes = [np.count_nonzero(x[: self.max_length] != IGNORED) for x in labels]
            num_targets = np.maximum(num_targets, sizes)
        self.row_widths = self.widths[np.searchsorted(self.widths, lengths)]
        # One number of targets for each width, so that each width has one shape.
        # Shorter rows can have more targets, and may be in a batch of this width.
        self.max_targets = {
            int(width): int(round_up(num_targets[self.row_widths <= width].max()))
            for width in self.widths
        }

    def __len__(self) -> int:
        return sys.maxsize if self.count is None else -(-self.count // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        packs = [[self.rows[i] for i in pack] for pack in self.packs(index)]
        return self.pack(packs) if self.packing else self.pad(sum(packs, []))

    def packs(self, index: int) -> list[Sequence[int]]:
        """Returns the indices of the rows in each pack of a batch.

        Without packing, each row is a pack by itself.
        """
        if self.packing:
            return self._indices(index, 1)
        window, position = divmod(index, self.window_size)
        return [[i] for i in self._window_batches(window)[position]]

    def _indices(self, first_batch: int, num_batches: int) -> list[Any]:
        # Returns the index of each row, or the indices of the rows of each pack.
        start = first_batch * self.batch_size
        stop = min(start + num_batches * self.batch_size, self.count or sys.maxsize)
        return [self.order[i] for i in range(start, stop)]

    def _cut_window(self, window: int) -> list[np.ndarray]:
        # Without packing, the order is cut into windows. A window is sorted by length
        # and cut into batches, which are shuffled.
        indices = np.array(self._indices(window * self.window_size, self.window_size))
        indices = indices[np.argsort(self.row_widths[indices], kind="stable")]
        starts = range(0, len(indices), self.batch_size)
        batches = [indices[i : i + self.batch_size] for i in starts]
        generator = np.random.default_rng([self.seed, window, 1])
        return [batches[i] for i in generator.permutation(len(batches))]

    def pack(self, packs: list[list[Row]]) -> Batch:
        """Returns a batch whose rows have several sequences."""
        groups = [[x for row in pack for x in row.sequences] for pack in packs]
        max_trained = max(sum(row.num_trained for row in group) for group in groups)
        num_targets = int(round_up(max_trained, self.target_multiple))
        shape = self.batch_size, self.width, num_targets, self.num_sequences
        return collate(groups, *shape)

    def pad(self, rows: list[Row]) -> Batch:
        """Returns a batch whose rows have one sequence each."""
        if self.is_labelled:
            # KTO estimates the KL divergence from mismatched pairs. As in TRL, each
            # prompt gets the completion of the row before it.
            mismatched = map(self._mismatch, rows, rows[-1:] + rows[:-1])
            pairs = zip(rows, mismatched, strict=True)
        else:
            pairs = (row.sequences for row in rows)
        groups = [[sequence] for pair in pairs for sequence in pair]
        size = self.batch_size * len(groups) // len(rows)  # a pair fills two rows
        longest = max(len(row.ids) for [row] in groups)
        width = int(self.widths[np.searchsorted(self.widths, longest)])
        num_targets = self.max_targets[width]
        return collate(groups, size, width, num_targets, int(self.is_preference))

    def _mismatch(self, row: Row, previous: Row) -> Row:
        previous = previous.uncut or previous
        ids = np.concatenate([row.ids[: row.start], previous.ids[previous.start :]])
        untrained = np.full_like(row.ids[: row.start], IGNORED)
        labels = np.concatenate([untrained, previous.labels[previous.start :]])
        # KTO ignores this label, but `collate` needs one to fill in `answers`.
        mismatched = row._replace(ids=ids, labels=labels, label=False)
        return mismatched.truncated(self.max_length)


def collate(
    groups: Sequence[Sequence[Row]],
    size: int,
    width: int,
    num_targets: int,
    num_sequences: int = 0,  # S of `Batch.answers`, or 0 for no answers
) -> Batch:
    """Returns a batch of `size` rows. Each group of sequences fills one of them."""
    ids, segments, positions = np.zeros((3, size, width), np.int32)  # [B, T]
    select, targets = np.zeros((2, size, num_targets), np.int32)  # [B, P]
    weights = np.zeros((size, num_targets), np.float32)
    answers = np.zeros((size, num_sequences, num_targets), np.float32)  # [B, S, P]
    # Positions count up in padding too, as the decoder requires of each segment.
    positions[len(groups) :] = np.arange(width)
    for i, group in enumerate(groups):
        start, filled = 0, 0  # the tokens and the targets of the sequences so far
        for segment, row in enumerate(group, 1):
            span = slice(start, start + len(row.ids))
            ids[i, span], segments[i, span] = row.ids, segment
            positions[i, span] = np.arange(len(row.ids))
            # The token at t predicts the label at t + 1.
            (selected,) = np.nonzero(row.labels[1:] != IGNORED)
            target_span = slice(filled, filled + len(selected))
            select[i, target_span] = start + selected
            targets[i, target_span] = row.labels[1:][selected]
            # All targets have the weight 1, except those of bad completions.
            weights[i, target_span] = row.label is not False
            if row.label is not None:
                sign = 1 if row.label else -1
                is_completion = selected + 1 >= row.start
                answers[i, segment - 1, target_span] = sign * is_completion
            start, filled = span.stop, target_span.stop
        positions[i, start:] = np.arange(width - start)
    arrays = ids, segments, positions, select, targets, weights
    return Batch(*arrays, answers if num_sequences else None)
