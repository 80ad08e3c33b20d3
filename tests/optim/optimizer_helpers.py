"""Training with an optimizer, for tests of optimizers."""

import functools

import jax
import jax.numpy as jnp
import optax


def train_tree(tx, tree, gradients, steps, **extra):
    """Trains with a donated, jitted step; returns the parameters and the state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tree, state, seed):
        updates, state = tx.update(gradients(tree, seed), state, tree, **extra)
        return optax.apply_updates(tree, updates), state

    tree = jax.tree.map(jnp.array, tree)
    state = tx.init(tree)
    for seed in range(steps):
        tree, state = step(tree, state, seed)
    return tree, state
