"""Helpers for the tests of linen models."""

import functools

import jax
import jax.numpy as jnp
from helpers import biases, normal, put, randomized
from tolerances import assert_close

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=4, alpha=8, block_size=16)


def make_x():
    return normal(0, (2, 5, 64))


def setup(model, x, config=CONFIG):
    """Returns parameters with nonzero biases, and their base and lora trees."""
    return _setup(model, x, config)[:3]


def variables_of(model, x, config=CONFIG, *args, **options):
    """Returns the variables of a wrapped model; B of the adapters is not zero."""
    _, base, lora, collections = _setup(model, x, config, *args, **options)
    return {"params": base, "lora": randomized(lora), **collections}


def _setup(model, x, *args, **options):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    trees = _cached(model, shape, *args, **options)
    return jax.tree.map(lambda leaf: leaf, trees)  # new dicts for the caller


@functools.cache
def _cached(model, shape, config, *args, **options):
    x = jnp.zeros(shape.shape, shape.dtype)
    collections = jax.jit(lambda x: model.init(jax.random.key(0), x, *args))(x)
    params = collections.pop("params")
    params = put(params, randomized(biases(params)))
    key, options = jax.random.key(1), {"other_variables": collections, **options}
    base, lora = ql.linen.init(key, model, params, config, x, *args, **options)
    return params, base, lora, collections


def merged(variables):
    collections = {n: v for n, v in variables.items() if n not in ("params", "lora")}
    return {**collections, "params": ql.merge(variables["params"], variables["lora"])}


def assert_as_merged(model, x, variables, gradients=True, **call):
    """Asserts that results and gradients are those of the model on merged weights."""
    wrapped, collections = ql.linen.wrap(model), dict(variables)
    lora = collections.pop("lora")

    def packed(lora, x):
        return wrapped.apply({**collections, "lora": lora}, x, **call)

    def plain(lora, x):
        return model.apply(merged({**collections, "lora": lora}), x, **call)

    def loss(apply):
        def sum_of_squares(lora, x):
            y = apply(lora, x)
            return sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(y)), y

        return jax.jit(jax.grad(sum_of_squares, argnums=(0, 1), has_aux=True))

    if gradients:
        assert_close(loss(packed)(lora, x), loss(plain)(lora, x))
    else:
        assert_close(packed(lora, x), plain(lora, x))
