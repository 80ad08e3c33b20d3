"""Training with an optimizer, for tests of optimizers."""

import functools

import jax
import jax.numpy as jnp
import optax

import qlora_jax as ql

# Ways to apply a transformation of adapters to a combined tree.
ONE_TREE = {
    "partition": lambda tx: optax.partition(
        {"lora": tx, "frozen": optax.set_to_zero()}, ql.lora_labels
    ),
    "masked": lambda tx: optax.masked(tx, ql.lora_mask),
}


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


def train_in_a_scan(tx, tree, gradients, steps):
    """Trains as `train_tree` does, in a scan within a single program."""

    def step(carry, seed):
        tree, state = carry
        updates, state = tx.update(gradients(tree, seed), state, tree)
        return (optax.apply_updates(tree, updates), state), None

    def run_steps(*both):
        return jax.lax.scan(step, both, jnp.arange(steps))[0]

    return jax.jit(run_steps)(tree, tx.init(tree))


def run_donated(step, trees):
    """Runs three steps on donated trees: each frees its inputs, and nothing leaks."""
    live = []
    for _ in range(3):
        before = jax.tree.leaves(trees)
        trees = step(*trees)
        assert all(x.is_deleted() for x in before)
        del before
        live.append(len(jax.live_arrays()))
    assert live[1] == live[2]
    return trees


def is_paged(state):
    """Whether arrays with axes are in host memory, and scalars on the device."""
    kinds = {(x.ndim > 0, x.sharding.memory_kind) for x in jax.tree.leaves(state)}
    return (True, "pinned_host") in kinds and kinds <= {
        (True, "pinned_host"), (False, "device")
    }  # fmt: skip


def carried(off, tree):
    """Returns the shapes of host arrays that loops of an update carry."""
    program = jax.make_jaxpr(off.update)(tree, off.init(tree), tree)
    loops = [e for e in program.jaxpr.eqns if e.primitive.name in ("scan", "while")]
    host = jax.memory.Space.Host
    outputs = [v.aval for e in loops for v in e.outvars]
    return {aval.shape for aval in outputs if aval.memory_space == host}
