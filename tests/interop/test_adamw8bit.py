"""8-bit AdamW beside bitsandbytes' AdamW8bit, on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.optim.blocks import decode


def codes_of(blocks):
    """`[rows, columns]`, from the bytes of the words."""
    words = np.asarray(blocks.codes)[0]
    codes = np.stack([(words >> (8 * i)) & 255 for i in range(4)], 1)
    return codes.reshape(-1, words.shape[1])


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_the_same(signed):
    want = create_dynamic_map(signed=signed).numpy()
    assert_close(decode(jnp.arange(256), signed), want, terms=64)


def test_steps_are_the_same():
    """Rows of 512 values: blocks are the same in both."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 512)).astype(np.float32)
    ours = jnp.asarray(w)
    tx = ql.optim.adamw8bit(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1)
    theirs = torch.nn.Parameter(torch.tensor(w))
    optimizer = AdamW8bit(
        [theirs], 1e-2, (0.9, 0.99), eps=1e-8, weight_decay=0.1, min_8bit_size=4096
    )
    state, step = tx.init(ours), jax.jit(tx.update)
    for count in range(1, 4):
        # Within the range of the unsigned map: it has no other zeros than ours.
        sign = rng.choice([-1, 1], size=w.shape)
        g = (sign * rng.uniform(0.01, 1, size=w.shape)).astype(np.float32)
        updates, state = step(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(g)
        optimizer.step()
        held = optimizer.state[theirs]
        assert held["state1"].dtype == torch.uint8
        # A twentieth of an update: where codes differ, a moment does by a step.
        if count > 1:  # Codes that differ are followed by others.
            assert np.abs(ours - theirs.detach().numpy()).max() < 1e-2 / 20
            continue
        assert_close(ours, theirs.detach().numpy())
        for moment, number in ((state[0].mu, 1), (state[0].nu, 2)):
            got, want = codes_of(moment), held[f"state{number}"].numpy()
            # Their kernel rounds some values near a tie to the other side.
            assert np.mean(got != want) < 0.02
            assert np.abs(got - want.astype(int)).max() <= 1
            scales = held[f"absmax{number}"].numpy().ravel()
            assert_close(moment.scales.ravel(), scales)
