"""What the tests of linen models share."""

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=4, alpha=8, block_size=16)


def make_x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 64)), jnp.float32)


def setup(model, x, config=CONFIG):
    """Parameters with biases away from zero, and the two trees made of them."""
    params = model.init(jax.random.key(0), x)["params"]
    params = put(params, randomized(biases(params)))
    base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
    return params, base, lora


def randomized(lora):
    """B (or biases) away from zero, so that every adapter counts."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.1, a.dtype), lora
    )


def biases(tree):
    """The biases by path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    return {path: leaf for path, leaf in named.items() if "'bias'" in path}


def put(tree, leaves):
    """The tree with other leaves at their paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), tree
    )


def close(got, want, tol=2e-5):
    """The largest leaf says what is zero: a key's bias has no gradient, for one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    largest = max(np.linalg.norm(np.asarray(b, np.float64)) for _, b in pairs)
    for a, b in pairs:
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tol * max(np.linalg.norm(b), 1e-3 * largest)
