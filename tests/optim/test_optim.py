"""Optax on two trees and on one. test_offload.py has other optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, normal
from optimizer_helpers import ONE_TREE, run_donated, train_tree
from tolerances import assert_close

import qlora_jax as ql

STEPS = 10


def setup(**settings):
    params = {
        "up": {"kernel": normal(0, (64, 128), scale=1 / 8), "bias": jnp.zeros(128)},
        "down": {"kernel": normal(1, (128, 64), scale=1 / 8)},
    }
    config = ql.QLoRAConfig(rank=4, **settings)
    base, lora = ql.init(jax.random.key(0), params, config)
    x = normal(2, (32, 64))
    return base, lora, x, jnp.roll(x, 1, axis=-1)


def loss(base, lora, x, y):
    hidden = jnp.tanh(ql.apply(base["up"], lora["up"], x))
    return jnp.mean((ql.apply(base["down"], lora["down"], hidden) - y) ** 2)


gradients = jax.grad(loss, argnums=1)


def one_tree_loss(tree, x, y):
    return loss(*ql.split(tree), x, y)


def two_trees(tx, base, lora, x, y):
    return train_tree(tx, lora, lambda lora, _: gradients(base, lora, x, y), STEPS)


def one_tree(tx, base, lora, x, y):
    def lora_gradients(tree, _):
        return ql.value_and_grad(one_tree_loss)(tree, x, y)[1]

    return train_tree(tx, ql.combine(base, lora), lora_gradients, STEPS)


def array_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree) if hasattr(x, "nbytes"))


def several(tx, n):
    return optax.MultiSteps(tx, n).gradient_transformation()


ADAMW = {"adamw": optax.adamw(1e-2), "MultiSteps": several(optax.adamw(1e-2), 2)}


@pytest.mark.slow
@pytest.mark.parametrize("method", ONE_TREE)
@pytest.mark.parametrize("name", ADAMW)
def test_one_tree_trains_as_two_and_leaves_the_base_alone(name, method):
    base, lora, x, y = setup()
    want, want_state = two_trees(ADAMW[name], base, lora, x, y)
    tree, state = one_tree(ONE_TREE[method](ADAMW[name]), base, lora, x, y)
    got_base, got_lora = ql.split(tree)
    assert_same(got_base, base)
    # Adam divides by the size of the gradient, so rounding errors of small gradients
    # change updates as much as those of large ones. Steps are 1e-2.
    assert_close(got_lora, want, terms=64)
    # No moments for frozen leaves.
    assert array_bytes(state) == array_bytes(want_state)


@pytest.mark.slow
def test_multi_steps_inside_the_mask_accumulates_for_adapters_alone():
    base, lora, x, y = setup()
    tx = ONE_TREE["masked"](several(optax.sgd(1.0), STEPS))
    tree, state = one_tree(tx, base, lora, x, y)
    got_base, got_lora = ql.split(tree)
    assert_same(got_base, base)
    # Ten equal gradients, averaged, applied once: one step of plain SGD.
    grads = gradients(base, lora, x, y)
    want = jax.tree.map(lambda param, g: param - g, lora, grads)
    assert_close(got_lora, want)
    assert array_bytes(state) < 2 * array_bytes(lora)


@pytest.mark.parametrize("fmt", ["nf4", "nvfp4", None])
@pytest.mark.parametrize("method", ONE_TREE)
def test_clipping_by_the_norm_of_a_whole_tree(fmt, method):
    """Scales of nvfp4 are 8-bit floats, which JAX does not promote."""
    base, lora, x, y = setup(fmt=fmt)
    clip, sgd = optax.clip_by_global_norm(1e-3), optax.sgd(1.0)
    plain, grads = optax.chain(clip, sgd), gradients(base, lora, x, y)
    want, _ = plain.update(grads, plain.init(lora))
    assert optax.tree.norm(grads) > 1e-3

    tree, tx = ql.combine(base, lora), optax.chain(clip, ONE_TREE[method](sgd))
    grads = ql.value_and_grad(one_tree_loss)(tree, x, y)[1]
    assert array_bytes(grads) == array_bytes(lora)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    got_base, got_lora = ql.split(optax.apply_updates(tree, updates))
    assert_close(got_lora, jax.tree.map(jnp.add, lora, want))
    for got, leaf in zip(*map(jax.tree.leaves, (got_base, base)), strict=True):
        assert got is leaf  # not even copied


@pytest.mark.parametrize("as_numpy", [False, True])
def test_a_step_of_gradient_descent_by_hand(as_numpy):
    base, lora, x, y = setup()
    grads = ql.value_and_grad(one_tree_loss)(ql.combine(base, lora), x, y)[1]
    to_numpy = (lambda x: np.asarray(x)) if as_numpy else lambda x: x
    tree = jax.tree.map(to_numpy, ql.combine(base, lora))
    got = jax.tree.map(lambda param, g: param - 0.5 * g, tree, grads)
    assert_same(ql.split(got)[0], base)
    want = gradients(base, lora, x, y)
    assert_close(ql.split(got)[1], jax.tree.map(lambda w, g: w - 0.5 * g, lora, want))


def test_weight_decay_without_a_mask_is_refused():
    """It would change packed codes."""
    base, lora, x, y = setup()
    tree, tx = ql.combine(base, lora), optax.adamw(1e-2, weight_decay=0.1)
    grads = ql.value_and_grad(one_tree_loss)(tree, x, y)[1]
    with pytest.raises(ValueError, match="NoGradient"):
        tx.update(grads, tx.init(tree), tree)
    # With a mask, the moments of adamw would still include those of the codes.
    tx = optax.add_decayed_weights(0.1, mask=ql.lora_mask)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    want = jax.tree.map(lambda g, w: g + 0.1 * w, ql.split(grads)[1], lora)
    assert_close(ql.split(updates)[1], want)
    assert not jax.tree.leaves(ql.split(updates)[0])


class TestTraps:
    """Errors that happen without `ql.value_and_grad`: see docs/development/traps.md."""

    def test_float0_gradients_break_apply_updates(self):
        base, lora, x, y = setup()
        tree = ql.combine(base, lora)
        grads = jax.grad(one_tree_loss, allow_int=True)(tree, x, y)
        with pytest.raises(Exception):  # noqa: B017  the kind differs by version
            optax.apply_updates(tree, grads)

    def test_multi_steps_outside_the_partition_accumulates_for_all(self):
        base, lora, _, _ = setup()
        tree, tx = ql.combine(base, lora), optax.sgd(1e-2)
        outside = optax.MultiSteps(ONE_TREE["partition"](tx), 2).init(tree)
        inside = ONE_TREE["partition"](several(tx, 2)).init(tree)
        assert array_bytes(outside) > sum(a.size for a in jax.tree.leaves(base))
        assert array_bytes(inside) < 2 * array_bytes(lora)


@pytest.mark.slow
def test_value_and_grad_with_auxiliary_output_and_trained_kernels():
    base, lora, x, y = setup(freeze_base=False)
    tree = ql.combine(base, lora)

    def loss_with_aux(tree, x):
        return (one_tree_loss(tree, x, y), x.shape)

    (value, aux), grads = ql.value_and_grad(loss_with_aux, has_aux=True)(tree, x)
    assert aux == x.shape
    assert value == pytest.approx(float(loss(base, lora, x, y)))
    want = jax.grad(loss)(base, lora, x, y)["up"]["kernel"].kernel
    assert_close(grads["up"]["kernel"].base.kernel, want)
    assert not jax.tree.leaves(grads["up"]["bias"])


@pytest.mark.slow
def test_a_donated_step():
    """Adapters, moments and base are donated."""
    base, lora, x, y = setup()
    tx = optax.adamw(1e-2)

    def step(base, lora, moments):
        updates, moments = tx.update(gradients(base, lora, x, y), moments, lora)
        return base, optax.apply_updates(lora, updates), moments

    start = base, lora, tx.init(lora)
    want, trees = start, jax.tree.map(jnp.array, start)
    for _ in range(3):
        want = jax.jit(step)(*want)
    trees = run_donated(jax.jit(step, donate_argnums=(0, 1, 2)), trees)
    assert_same(trees, want)
    assert_same(trees[0], base)
