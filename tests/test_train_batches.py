"""Batches: each row once an epoch, packed or not; a place to go on from."""

import json

import numpy as np
import pytest

from qlora_jax.train import Row, batches, eval_batches


def rows_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids = rng.integers(1, 90, n).astype(np.int32)
        labels = np.where(rng.random(n) < 0.4, ids, -100).astype(np.int32)
        labels[-1] = ids[-1]
        rows.append(Row(ids, labels, f"d:{i}"))
    return rows


def sequences(batch):
    """The (tokens, trained tokens with their places) of a batch."""
    for row in range(len(batch.ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            (places,) = np.nonzero(batch.segment_ids[row] == segment)
            np.testing.assert_array_equal(
                batch.positions[row, places], range(len(places))
            )
            inside = np.isin(batch.select[row], places) & (batch.weights[row] > 0)
            chosen = batch.select[row][inside] - places[0] + 1
            found = zip(
                chosen.tolist(), batch.targets[row][inside].tolist(), strict=True
            )
            yield tuple(batch.ids[row, places].tolist()), tuple(found)


def expected(rows):
    for row in rows:
        places = [i for i in range(1, len(row.ids)) if row.labels[i] != -100]
        yield tuple(row.ids.tolist()), tuple((i, int(row.labels[i])) for i in places)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count, size", [(37, 4), (3, 8), (8, 8)])
def test_each_row_comes_once_an_epoch(packing, count, size):
    rows = rows_of(np.random.default_rng(1).integers(2, 60, count))
    settings = dict(batch_size=size, max_length=64, packing=packing)
    found = [*batches(rows, **settings, seed=0, num_epochs=3)]
    assert sorted(s for b in found for s in sequences(b)) == sorted(
        [*expected(rows)] * 3
    )
    assert len({tuple(x.shape for x in b) for b in found}) <= 8
    assert all(b.ids.shape[0] == size and b.ids.shape[1] <= 64 for b in found)
    other = [*batches(rows, **settings, seed=1, num_epochs=3)]
    assert count == 8 or not all(map(np.array_equal, found[0], other[0]))
    # The processes' shards are the batch.
    parts = [
        [*batches(rows, **settings, seed=0, num_epochs=3, shard=(i, 2))] for i in (0, 1)
    ]
    for whole, *halves in zip(found, *parts, strict=True):
        for x, *y in zip(whole, *halves, strict=True):
            np.testing.assert_array_equal(x, np.concatenate(y))


@pytest.mark.parametrize("packing", [True, False])
def test_iterators_go_on_from_a_state(packing):
    rows = rows_of(np.random.default_rng(1).integers(2, 60, 23))
    make = lambda: batches(rows, batch_size=3, max_length=64, seed=5, packing=packing)
    iterator, states, found = make(), [], []
    for _ in range(30):
        states.append(json.dumps(iterator.get_state()))
        found.append(next(iterator))
    assert max(map(len, states)) < 100
    for place in np.random.default_rng(0).permutation(30)[:8]:
        again = make()
        again.set_state(json.loads(states[place]))
        for batch in found[place : place + 3]:
            for x, y in zip(batch, next(again), strict=True):
                np.testing.assert_array_equal(x, y)


def test_evaluation_has_each_row_in_order():
    rows = rows_of([5, 40, 7, 9, 3])
    found = eval_batches(rows, batch_size=2, max_length=64)
    assert [s for b in found for s in sequences(b)] == [*expected(rows)]
    assert all(len(b.ids) == 2 for b in found)
