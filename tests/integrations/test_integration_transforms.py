"""One contract for both Flax integrations: transforms, training, memory."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import biases, normal, put, randomized
from integration_helpers import CONFIG, INTEGRATIONS, build, value_and_gradients
from integration_pairs import DEEP, PAIRS
from tolerances import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("flax", INTEGRATIONS.values(), ids=list(INTEGRATIONS)),
]


@pytest.mark.parametrize("name", ["mlp", "own", "mlp stack", "own stack"])
def test_vmap_over_inputs_adapters_and_bases(flax, name):
    wrapped, lora, x = build(flax, name)
    base = wrapped.base
    second = randomized(lora, 50), put(base, randomized(biases(base), 60)), 2 * x
    both = (lora, base, x), second
    stacks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    alone = jax.jit(wrapped.apply)
    for axes in [(None, None, 0), (0, None, 0), (0, 0, 0)]:

        def pick(mapped, axes):
            return [
                both[0][place] if axis is None else mapped[place]
                for place, axis in enumerate(axes)
            ]

        got = jax.jit(jax.vmap(wrapped.apply, axes))(*pick(stacks, axes))
        assert_close(got[0], alone(*both[0]))
        assert_close(got[1], alone(*pick(second, axes)))


@pytest.mark.parametrize("name", ["mlp", "own"])
def test_a_checkpointed_apply_has_the_same_gradients(flax, name):
    wrapped, lora, x = build(flax, name)

    def run(apply):
        return value_and_gradients(apply, wrapped.base)(lora, x)

    assert_close(run(jax.checkpoint(wrapped.apply)), run(wrapped.apply))


@pytest.mark.parametrize("name", ["mlp", "own", "mlp stack"])
def test_training_moves_the_adapters_alone_in_one_trace(flax, name):
    wrapped, _, x = build(flax, name)
    lora = jax.tree.map(jnp.copy, wrapped.lora)
    before = jax.tree.map(np.asarray, wrapped.base)
    target, tx = normal(3, x.shape), optax.adamw(1e-2)

    # chex identifies functions by their source, so traces of other cases would count.
    chex.clear_trace_counter()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(lora, state, base):
        def loss(lora):
            return jnp.mean((wrapped.apply(lora, base, x) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    state_size = sum(a.size for a in jax.tree.leaves(state))
    assert state_size <= 2 * sum(a.size for a in jax.tree.leaves(lora)) + 2
    for _ in range(10):
        donated = jax.tree.leaves(lora)
        lora, state, value = step(lora, state, wrapped.base)
        assert all(a.is_deleted() for a in donated)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, wrapped.base, before)


def gradient(wrapped):
    return jax.grad(lambda lora, base, x: jnp.sum(wrapped.apply(lora, base, x)))


@pytest.mark.parametrize(("name", "part"), [("dense", 4), ("own", 2)])
def test_scanned_layers_never_hold_the_float_stack(flax, name, part):
    pair = DEEP[name]
    x = jnp.ones(pair.shape)
    wrapped = flax.wrap(flax.make(pair), CONFIG, x)
    lowered = jax.jit(gradient(wrapped)).lower(wrapped.lora, wrapped.base, x)
    memory: Any = lowered.compile().memory_analysis()
    ((_, shape),) = pair.matrices.items()
    assert memory.temp_size_in_bytes < 4 * np.prod(shape) / part


KERNELS = ["dense", "own", "two kernels", "convolution"]


@pytest.mark.parametrize(
    ("name", "mapped"),
    [*itertools.product(KERNELS, ["", "ab"]), ("own", "a"), ("own", "b")],
)
def test_float_kernels_are_not_kept_for_the_backward_pass(flax, name, mapped):
    """The same holds where vmap gives A, B or both one more axis."""
    wrapped, lora, x = build(flax, name)
    factors, treedef = jax.tree.flatten(lora)

    def run(lora, x):
        return wrapped.apply(treedef.unflatten(lora), wrapped.base, x)

    if mapped:
        axes = [0 if name in mapped else None for name in "ab" * (len(factors) // 2)]

        def stack_twice(a, axis):
            return a if axis is None else jnp.stack([a, a])

        factors, x = [*map(stack_twice, factors, axes)], stack_twice(x, 0)
        run = jax.vmap(run, (axes, 0))
    _, pullback = jax.vjp(run, factors, x)
    sizes = [a.size for a in jax.tree.leaves(pullback) if a.dtype != jnp.uint8]
    assert max(sizes) < min(map(np.prod, PAIRS[name].matrices.values()))
