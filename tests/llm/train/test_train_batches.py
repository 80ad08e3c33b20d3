"""Batches: each row once an epoch, packed or not; iterators that resume."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.llm.data import Row, batches, eval_batches
from qlora_jax.llm.data.ordering import choose_widths, pack_lengths
from qlora_jax.llm.models.decoder import are_in_order


def rows_of(lengths, vocab=90):
    rng, rows = np.random.default_rng(0), []
    for i, n in enumerate(lengths):
        ids = rng.integers(1, vocab, n).astype(np.int32)
        labels = np.where(rng.random(n) < 0.4, ids, -100).astype(np.int32)
        labels[-1] = ids[-1]
        rows.append(Row(ids, labels, f"d:{i}"))
    return rows


def sequences(batch):
    """Yields the tokens of each sequence, and its targets with their positions."""
    assert are_in_order(batch.positions, batch.segment_ids).all()  # padding too
    for row in range(len(batch.ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            (indices,) = np.nonzero(batch.segment_ids[row] == segment)
            assert batch.positions[row, indices].tolist() == [*range(len(indices))]
            is_inside = np.isin(batch.select[row], indices) & (batch.weights[row] > 0)
            positions = batch.select[row][is_inside] - indices[0] + 1
            targets = zip(positions, batch.targets[row][is_inside], strict=True)
            yield tuple(batch.ids[row, indices]), tuple(targets)


def expected_sequences(rows):
    """Yields what `sequences` yields, from the rows themselves."""
    for row in rows:
        positions = [i for i in range(1, len(row.ids)) if row.labels[i] != -100]
        yield tuple(row.ids), tuple((i, row.labels[i]) for i in positions)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count, size", [(37, 4), (3, 8), (8, 8)])
def test_each_row_comes_once_an_epoch(packing, count, size):
    rows = rows_of(np.random.default_rng(1).integers(2, 60, count))
    settings = dict(batch_size=size, max_length=64, packing=packing)
    epoch_batches = [*batches(rows, **settings, seed=0, num_epochs=3)]
    expected_rows = sorted([*expected_sequences(rows)] * 3)
    assert sorted(s for b in epoch_batches for s in sequences(b)) == expected_rows
    assert len({(b.ids.shape, b.select.shape) for b in epoch_batches}) <= 8
    assert all(b.ids.shape[0] == size and b.ids.shape[1] <= 64 for b in epoch_batches)
    reshuffled_batches = [*batches(rows, **settings, seed=1, num_epochs=3)]
    assert count == 8 or not all(
        map(np.array_equal, epoch_batches[0], reshuffled_batches[0])
    )


@pytest.mark.parametrize("packing", [True, False])
def test_data_sets_are_mixed_by_weights(packing):
    """Each data set yields all of its rows before it starts again; resumed, too."""
    rows = rows_of(np.random.default_rng(1).integers(2, 60, 43))
    mix = [(30, 2.0), (9, 0.5), (4, 1.5)]
    settings = dict(batch_size=10, max_length=64, seed=0, packing=packing, mix=mix)
    iterator, batch_rows = batches(rows, **settings), []
    index_of = {ids: i for i, (ids, _) in enumerate(expected_sequences(rows))}

    def data_set_of(ids):
        return int(np.searchsorted([30, 39], index_of[ids], side="right"))

    for _ in range(80):  # 800 rows: two periods, with whole numbers as shares
        batch = next(iterator)
        first = zip(batch.ids, batch.segment_ids == 1, strict=True)
        batch_rows.append([tuple(ids[inside]) for ids, inside in first])
    rows_in = [data_set_of(ids) for batch in batch_rows for ids in batch]
    assert np.bincount(rows_in).tolist() == [400, 100, 300]
    if not packing:
        row_indices = [index_of[ids] for batch in batch_rows for ids in batch]
        for first, last in ((0, 30), (30, 39), (39, 43)):
            times = np.bincount([i for i in row_indices if first <= i < last])
            times = times[first:last]
            assert times.max() - times.min() <= 1
    resumed = batches(rows, **settings)
    resumed.set_state({"next_index": 79})
    for x, y in zip(batch, next(resumed), strict=True):
        np.testing.assert_array_equal(x, y)
    # An epoch ends before a data set would start again: 4 rows are 3 / 8 of it.
    num_rows = sum(
        len([*sequences(x)]) for x in batches(rows, **settings, num_epochs=1)
    )
    assert packing or num_rows == 10


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (0.55, 0.45)])
def test_data_sets_in_the_ratio_of_their_weights_end_together(weights):
    counts = [round(100 * weight) for weight in weights]
    rows = [Row(np.array([i, 1]), np.array([i, 1]), "") for i in range(100)]
    mix = [*zip(counts, weights, strict=True)]
    settings = dict(batch_size=5, max_length=8, seed=0, packing=False)
    epochs = batches(rows, **settings, num_epochs=2, mix=mix)
    first_ids = np.concatenate([batch.ids[:, 0] for batch in epochs])
    assert sorted(first_ids) == [*np.repeat(range(100), 2)]


def test_a_labelled_answer_without_a_prompt_follows_that_of_another_row():
    answer, prompt = np.arange(10, 19), np.array([3, 4])
    other_ids, other_labels = np.array([3, 4, 5]), np.array([-100, -100, 5])
    rows = [Row(answer, answer, "d:1", start=0, label=True)]
    rows += [Row(other_ids, other_labels, "d:2", start=2, label=False)]
    [batch] = eval_batches(rows, batch_size=2, max_length=16)
    # Rows alternate between a row, and its prompt with the answer of the other one.
    assert batch.ids[3, :11].tolist() == [*prompt, *answer]
    is_answer = batch.answers[3, 0] != 0
    assert batch.targets[3, is_answer].tolist() == answer.tolist()
    assert batch.select[3, is_answer].tolist() == [*range(1, 10)]


def test_mismatched_answers_are_cut_after_they_are_joined():
    # The answer of the first row is cut to 2 tokens, and fits after the other prompt.
    ids = np.arange(10, 24)
    labels = np.where(np.arange(14) < 6, -100, ids)
    row = Row(ids, labels, "d:1", start=6, label=True).truncated(8)
    other_ids, other_labels = np.array([3, 4, 5]), np.array([-100, -100, 5])
    other = Row(other_ids, other_labels, "d:2", start=2, label=False)
    [batch] = eval_batches([row, other], batch_size=2, max_length=8)
    assert batch.ids[0].tolist() == [*range(10, 18)]
    assert batch.ids[3].tolist() == [3, 4, *range(16, 22)]
    is_answer = batch.answers[3, 0] != 0
    assert batch.targets[3, is_answer].tolist() == [*range(16, 22)]


def test_evaluation_has_each_row_in_order():
    rows = rows_of([5, 40, 7, 9, 3])
    batches_in_order = eval_batches(rows, batch_size=2, max_length=64)
    assert [s for b in batches_in_order for s in sequences(b)] == [
        *expected_sequences(rows)
    ]
    assert all(len(b.ids) == 2 for b in batches_in_order)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    capacity=st.integers(40, 64),
)
def test_packing_is_best_fit_decreasing(lengths, capacity):
    lengths = sorted(lengths, reverse=True)
    room: list[int] = []
    for length in lengths:  # by the definition
        fitting = [i for i, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=lambda i: room[i])] -= length
        else:
            room.append(capacity - length)
    packed = pack_lengths(lengths, capacity)
    assert sorted(i for row in packed for i in row) == [*range(len(lengths))]
    left = [capacity - sum(lengths[i] for i in row) for row in packed]
    assert sorted(left) == sorted(room)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_widths_are_few_and_the_best_ones(lengths):
    widths, lengths = choose_widths(np.array(lengths)), np.array(lengths)
    rounded = sorted({-(-n // 8) * 8 for n in lengths.tolist()})

    def padded(widths):
        return sum(min(w for w in widths if w >= n) for n in lengths)

    def least(k):
        return min(
            padded([*chosen, rounded[-1]])
            for chosen in itertools.combinations(rounded[:-1], k - 1)
        )

    assert {*widths.tolist()} <= {*rounded}
    assert padded(widths.tolist()) == least(len(widths))
    # There are no more widths than needed.
    is_most = len(widths) in (8, len(rounded))
    assert least(len(widths)) * 0.95 <= lengths.sum() or is_most
    assert len(widths) == 1 or least(len(widths) - 1) * 0.95 > lengths.sum()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rows": []}, "`rows` must have a row"),
        ({"batch_size": 0}, "`batch_size` must be positive"),
        ({"max_length": 8}, r"at most 8 tokens. Got \['d:1'\]"),
        ({"num_epochs": 0}, "`num_epochs` must be positive"),
        ({"mix": [(1, 1.0)]}, "`mix` must have the counts of all 2 rows"),
        ({"mix": [(1, 1.0), (1, 0.0)]}, "`mix` must have .*positive weights"),
    ],
)
def test_arguments_are_checked(overrides, message):
    settings = dict(rows=rows_of([5, 9]), batch_size=2, max_length=16, seed=0)
    with pytest.raises(ValueError, match=message):
        batches(**settings | {"packing": True} | overrides)
