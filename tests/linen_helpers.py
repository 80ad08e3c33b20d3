"""Helpers for the tests of linen models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import biases, put, randomized

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=4, alpha=8, block_size=16)


def make_x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 64)), jnp.float32)


def setup(model, x, config=CONFIG):
    """Parameters with nonzero biases, and their base and lora trees."""
    trees = _setup(model, jax.ShapeDtypeStruct(x.shape, x.dtype), config)
    return jax.tree.map(lambda leaf: leaf, trees)  # dicts of the caller's own


@functools.cache
def _setup(model, shape, config):
    x = jnp.zeros(shape.shape, shape.dtype)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    params = put(params, randomized(biases(params)))
    base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
    return params, base, lora
