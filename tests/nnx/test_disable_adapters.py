"""Without its adapters a wrapped model is the model on its dequantized weights."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_and_slow, randomized
from integration_helpers import CONFIG, DROPOUT, NNX, make_x
from integration_pairs import PAIRS
from tolerances import assert_close

import qlora_jax as ql


def make(name, config=CONFIG) -> tuple[Any, Any, Any]:
    """Returns a wrapped model (B is not zero), its merged B = 0 copy, and an input."""
    x = make_x(PAIRS[name])
    wrapped = NNX.wrap(NNX.make(PAIRS[name]), config, x)
    base = jax.tree.map(jnp.copy, wrapped.base)
    zero = wrapped.model(jax.tree.map(jnp.copy, wrapped.lora), base)
    return wrapped.model(randomized(wrapped.lora), wrapped.base), ql.nnx.merge(zero), x


@pytest.mark.parametrize(
    ("name", "config"),
    fast_and_slow(
        [("mlp", dataclasses.replace(DROPOUT, trainable=".*bias")), ("own", CONFIG)],
        [
            ("mlp stack", dataclasses.replace(CONFIG, trainable=".*bias")),
            ("own stack remat", CONFIG),
            ("mlp", dataclasses.replace(CONFIG, fmt=None)),
            ("mlp", dataclasses.replace(CONFIG, freeze_base=False)),
        ],
    ),
)
def test_the_base_alone_computes(name, config):
    model, base, x = make(name, config)
    run = nnx.jit(lambda model, x: model(x))
    model.eval()
    on, graph = run(model, x), nnx.graphdef(model)
    model.train()
    streams = jax.tree.map(np.asarray, nnx.state(model, nnx.RngCount))
    with ql.nnx.disable_adapters(model):
        assert_close(model(x), base(x))
        assert_close(run(model, x), base(x))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.RngCount), streams)
    model.eval()
    assert nnx.graphdef(model) == graph and not np.allclose(on, base(x))
    np.testing.assert_array_equal(run(model, x), on)


def test_each_state_is_one_program():
    model, _, x = make("mlp")
    run = nnx.jit(chex.assert_max_traces(lambda model, x: model(x), 2))
    for _ in range(2):
        run(model, x)
        with ql.nnx.disable_adapters(model):
            run(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "own", "mlp stack"])
def test_one_step_compares_both(name):
    """In a preference loss, the reference contributes nothing to the gradient."""
    model, base, x = make(name)
    wrt = nnx.DiffState(0, nnx.LoRAParam)

    def loss(model, x):
        with ql.nnx.disable_adapters(model):
            reference = model(x)
        return jnp.mean((model(x) - reference) ** 2)

    reference = base(x)

    def plain(model):
        return jnp.mean((model(x) - reference) ** 2)

    want = nnx.value_and_grad(plain, argnums=wrt)(model)
    assert_close(nnx.jit(nnx.value_and_grad(loss, argnums=wrt))(model, x), want)


@pytest.mark.slow
def test_inside_of_a_scan():
    model, base, x = make("mlp stack")

    def body(layer, x):
        with ql.nnx.disable_adapters(layer):
            return layer(x)

    scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    assert_close(scan(model.layers, x), base(x))


def test_a_part_and_a_nested_context_and_an_error():
    model, base, x = make("mlp")
    on, off = model(x), base(x)
    with ql.nnx.disable_adapters(model.gate):
        assert_close(model.gate(x), base.gate(x))
        assert not np.allclose(model.up(x), base.up(x))
        with ql.nnx.disable_adapters(model):
            assert_close(model(x), off)
        assert_close(model.gate(x), base.gate(x))
    with pytest.raises(KeyError), ql.nnx.disable_adapters(model):
        raise KeyError
    np.testing.assert_array_equal(model(x), on)
    with ql.nnx.disable_adapters(model):
        merged = ql.nnx.merge(model)
    assert_close(merged(x), on)
    match = "`model` must have adapters: wrap it first. Got NNXMLP without any"
    with pytest.raises(ValueError, match=match), ql.nnx.disable_adapters(merged):
        pass
