"""The dynamic loss scale, against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tolerances import assert_close

from qlora_jax.llm import train

GROWTH_INTERVAL = 7  # short, so that the scale grows several times in 200 steps


def half_loss(lora, base, batch, key):
    """Sums w * x over a batch. The gradient of each product is in float16."""
    w = jnp.broadcast_to(lora["w"], batch.shape)  # sums gradients in float32
    products = (w.astype(jnp.float16) * batch).astype(jnp.float32)
    return jnp.sum(products), batch.shape[0]


def draw_gradients(rng, steps):
    """Draws gradients of many sizes. Some overflow when scaled, and some are inf."""
    sizes = 2.0 ** rng.integers(-12, 6, (steps, 1, 1))
    x = (rng.normal(size=(steps, 8, 5)) * sizes).astype(np.float16)
    x[rng.random(steps) < 0.04, 3, 2] = np.inf
    x[rng.random(steps) < 0.02, 1, 0] = np.nan
    return x


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_random_run_equals_that_of_pytorch(accumulation):
    rng = np.random.default_rng(accumulation)
    rows = draw_gradients(rng, 200)
    start = rng.normal(size=5).astype(np.float32)
    # PyTorch's run.
    weight = torch.nn.Parameter(torch.tensor(start))
    adamw = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWTH_INTERVAL)
    want = []
    for x in torch.tensor(rows):
        scale = scaler.get_scale()
        for part in x.chunk(accumulation):
            products = weight.expand_as(part).half() * part
            scaler.scale(products.float().sum() / len(part)).backward()
        scaler.unscale_(adamw)
        weight.grad /= accumulation
        scaler.step(adamw)
        scaler.update()
        adamw.zero_grad()
        is_skipped = scaler.get_scale() < scale
        want.append((scale, is_skipped, weight.detach().numpy().copy()))
    # Ours.
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    loss_scale = train.LossScale.create(GROWTH_INTERVAL)
    lora = {"w": jnp.asarray(start)}
    state = train.State.create(lora, optimizer, seed=0, loss_scale=loss_scale)
    step, got, skipped = train.make_step(half_loss, optimizer), [], 0
    for x in rows:
        state, report = step(state, {}, np.split(x, accumulation))
        is_skipped, skipped = int(state.skipped) > skipped, int(state.skipped)
        scale = float(report.metrics["loss_scale"])
        got.append((scale, is_skipped, np.asarray(state.lora["w"])))
    scales, are_skipped, weights = zip(*got, strict=True)
    want_scales, want_skipped, want_weights = zip(*want, strict=True)
    assert scales == want_scales and are_skipped == want_skipped
    assert_close(np.array(weights), np.array(want_weights), terms=len(rows))
    # The run had what it tests.
    changes = np.sign(np.diff(scales))
    assert (changes > 0).sum() > 5 and (changes < 0).sum() > 5
    assert state.opt_state[0].count == len(rows) - skipped


def test_the_constants_are_those_of_pytorch():
    scaler, loss_scale = torch.amp.GradScaler("cpu"), train.LossScale.create()
    assert loss_scale.scale == scaler.get_scale()
    assert loss_scale.growth_interval == scaler.get_growth_interval()
    assert loss_scale.update(False).scale == 2**16 * scaler.get_backoff_factor()
    ready = loss_scale._replace(good_steps=jnp.int32(1999))
    assert ready.update(True).scale == 2**16 * scaler.get_growth_factor()
    largest = ready._replace(scale=jnp.float32(2**127))
    assert jax.tree.map(float, largest.update(True)) == (2**127, 0, 2000)
