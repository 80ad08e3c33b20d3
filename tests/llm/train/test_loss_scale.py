"""Training in float16 with a dynamic loss scale.

Tests in tests/interop compare it with PyTorch.

The products of the loss here are in float16, so their gradient overflows if the loss
scale times an input is larger than 65504.
"""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_mesh, spread
from tolerances import assert_close

from qlora_jax.llm import train
from qlora_jax.llm.train.callbacks import CheckFinite
from qlora_jax.llm.train.checkpoints import Checkpoints
from qlora_jax.llm.train.loop import Training

OPTIMIZER = optax.adam(0.1)


def loss(lora, base, batch, key):
    """Squared errors of w * x + 1, summed over the rows of a batch."""
    products = lora["w"].astype(jnp.float16)[None] * batch.astype(jnp.float16)
    return jnp.sum(jnp.square(products.astype(jnp.float32) + 1)), batch.shape[0]


def make_batch(seed, size=1.0):
    return size * np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32)


def start(fill=0.0, loss_scale=True):
    scale = train.LossScale.create(growth_interval=3) if loss_scale else None
    return train.State.create({"w": jnp.full(8, fill)}, OPTIMIZER, 0, scale)


STEP = train.make_step(loss, OPTIMIZER)
# The first steps overflow. Later the scale grows, and the large batch overflows.
RUN = [[make_batch(i, 64.0 if i == 9 else 1.0)] for i in range(12)]


def take(step, state, num_steps=12):
    for batches in RUN[:num_steps]:
        state, _ = step(state, {}, batches)
    return state


def test_skipped_steps_change_only_counts_and_the_scale():
    state = start()
    updates = []
    for batches in RUN:
        before = jax.tree.map(np.asarray, state._replace(key=0))
        state, report = STEP(state, {}, batches)
        assert report.metrics["loss_scale"] == before.loss_scale.scale
        after = state._replace(key=0)
        updates.append(bool(report.is_finite))
        if not report.is_finite:
            assert np.isfinite(report.loss) and not np.isfinite(report.grad_norm)
            chex.assert_trees_all_equal(after[2:4], before[2:4])
            assert after.loss_scale.scale == before.loss_scale.scale / 2
    assert state.skipped == updates.count(False) and 0 < state.skipped < 12
    assert not updates[0] and not updates[9]
    # The other steps have the updates of a run without a loss scale. The scale and the
    # number of rows are powers of two, so only exponents of intermediate values differ.
    expected = start(loss_scale=False)
    for batches, is_updated in zip(RUN, updates, strict=True):
        if is_updated:
            expected, _ = STEP(expected, {}, batches)
    assert_close(state.lora, expected.lora, roundings=12, dtype=np.float16)


def test_batches_of_a_step_are_scaled_by_their_own_number_of_rows():
    small_scale = train.LossScale.create()._replace(scale=jnp.float32(256))
    state = start()._replace(loss_scale=small_scale)
    whole = make_batch(0)
    _, got = STEP(state, {}, [whole[:1], whole[1:]])
    _, want = STEP(start(loss_scale=False), {}, [whole])
    assert_close(got.grad_norm, want.grad_norm, roundings=4, dtype=np.float16)
    assert_close(got.loss, want.loss)


def test_adapters_in_float16_get_gradients():
    def small_loss(lora, base, batch, key):
        return jnp.sum(1e-4 * lora["w"].astype(jnp.float32) * batch), 1

    lora, scale = {"w": jnp.zeros(4, jnp.float16)}, train.LossScale.create()
    state = train.State.create(lora, optax.sgd(1.0), 0, scale)
    state, _ = train.make_step(small_loss, optax.sgd(1.0))(state, {}, [np.ones(4)])
    # The loss scale, 65536, is infinite in float16.
    assert_close(state.lora["w"], np.full(4, -1e-4), roundings=4, dtype=np.float16)


def test_a_mesh_takes_the_same_steps():
    state = start()
    mesh = make_mesh("Auto")
    lora = spread({"w": jnp.zeros(8)}, mesh, ("a", "b"))
    split = train.State.create(lora, OPTIMIZER, 0, train.LossScale.create(3))
    shapes = train.State.shapes(lora, OPTIMIZER, train.LossScale.create(3))
    assert jax.tree.map(np.shape, shapes._replace(key=0)) == jax.tree.map(
        np.shape, split._replace(key=0)
    )
    got, want = take(STEP, split), take(STEP, state)
    chex.assert_trees_all_equal(
        *(jax.tree.map(np.asarray, (x.loss_scale, x.skipped)) for x in (got, want))
    )
    assert_close(
        *(jax.tree.map(np.asarray, x.lora) for x in (got, want)),
        roundings=12,
        dtype=np.float16,
    )


def test_a_restored_state_goes_on_with_its_scale(tmp_path):
    with Checkpoints(tmp_path) as states:
        state = take(STEP, start(), 8)
        states.save(state, {})
        states.wait()
        restored, _ = states.restore(start())
        assert restored.loss_scale.scale == state.loss_scale.scale != 2**16
        for batches in RUN[8:]:
            state, _ = STEP(state, {}, batches)
            restored, _ = STEP(restored, {}, batches)
        chex.assert_trees_all_equal(restored.loss_scale, state.loss_scale)
        # A run without a loss scale is a different run.
        with pytest.raises(ValueError, match=r"loss_scale\.scale"):
            states.restore(start(loss_scale=False))


def test_only_overflows_let_a_run_go_on(tmp_path, capsys):
    def check(loss=1.0, norm=np.inf, **row):
        state = SimpleNamespace(skipped=np.int32(3))
        training = Training(9, iter([]), state, step=4, is_finite=False)
        training.row = {"step": 4, "loss": loss, "grad_norm": norm, **row}
        CheckFinite(states).on_step(training)

    with Checkpoints(tmp_path) as states:
        check(loss_scale=2.0)
        message = capsys.readouterr().err
        assert "norm inf at loss scale 2: its update is skipped (3 so far)" in message
        for row in (dict(loss_scale=1.0), dict(loss=np.nan, loss_scale=2.0), {}):
            with pytest.raises(FloatingPointError, match="step 4 has loss"):
                check(**row)
