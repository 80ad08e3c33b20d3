"""Merge-aware adapters in trees, models and transformations, and what refuses them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from helpers import normal, relative_error, rounding
from jax.sharding import AxisType

import qlora_jax as ql

LAYERS, K = 3, 64


def make(shape=(K, K), **options):
    """A base and its adapter, as if it had been trained."""
    config = ql.QLoRAConfig(rank=4, merge_aware=True, **options)
    base, lora = ql.init(jax.random.key(0), {"kernel": normal(0, shape)}, config)
    trained_b = normal(1, lora["kernel"].b.shape, scale=0.1)
    return base, {"kernel": dataclasses.replace(lora["kernel"], b=trained_b)}


def run_layers(lora, base, x, wrap=lambda layer: layer):
    def layer(x, trees):
        return jnp.tanh(ql.apply(*trees, x)), None

    return jnp.sum(jax.lax.scan(wrap(layer), x, (base, lora))[0] ** 2)


def assert_close(trees, want):
    for got, array in zip(jax.tree.leaves(trees), jax.tree.leaves(want), strict=True):
        assert relative_error(got, array) < rounding(LAYERS * K)


@pytest.mark.newest
def test_rematerialized_and_streamed_layers_have_the_same_gradients():
    base, lora = make((LAYERS, K, K), target_fmt="nvfp4")
    x = normal(2, (5, K))
    want = jax.grad(run_layers)(lora, base, x)
    remat = jax.jit(lambda *args: jax.grad(run_layers)(*args, jax.checkpoint))
    assert_close(remat(lora, base, x), want)
    one_device = {"devices": jax.devices()[:1], "axis_types": (AxisType.Auto,)}
    mesh = jax.make_mesh((1,), ("x",), **one_device)
    placed = ql.sharding.place(base, lora, mesh, memory="host")
    assert placed[0]["kernel"].memory == "host"
    assert_close(jax.jit(jax.grad(run_layers))(placed[1], placed[0], x), want)


def test_adapters_are_vmapped():
    base, lora = make()
    x = normal(2, (5, K))
    loras = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), lora)
    gradient = jax.grad(lambda lora: jnp.sum(ql.apply(base, lora, x) ** 2))
    grads = jax.vmap(gradient)(loras)
    for i in range(2):
        at = jax.tree.map(lambda leaf, i=i: leaf[i], (loras, grads))
        assert_close(at[1], gradient(at[0]))


def test_merge_returns_the_packed_weights_and_a_loras_gradient():
    base, lora = make(target_fmt="q4_0")
    packed = ql.merge(base, lora, requantize=True)
    ordinary = lora["kernel"]
    settings = ordinary.a, ordinary.b, ordinary.scaling, 0.0, ordinary.geometry
    g = normal(2, (K, K))

    def loss(lora):
        return jnp.vdot(ql.merge(base, lora)["kernel"], g)

    np.testing.assert_array_equal(
        ql.merge(base, lora)["kernel"], ql.dequantize(packed)["kernel"]
    )
    assert_close(jax.grad(loss)(lora), jax.grad(loss)({"kernel": ql.LoRA(*settings)}))
    # Float kernels get the gradient of the sum, since the packer's derivative is 1.
    float_base, lora_of_floats = make(fmt=None, target_fmt="q4_0")
    gradient = jax.grad(
        lambda base: jnp.vdot(ql.merge(base, lora_of_floats)["kernel"], g)
    )(float_base)
    np.testing.assert_array_equal(gradient["kernel"], g)
    x = normal(3, (5, K))
    assert_close(x @ ql.merge(base, lora)["kernel"], ql.apply(base, lora, x))


def test_nnx_models_are_trained():
    x, target = normal(2, (8, K)), normal(3, (8, K))
    config = ql.QLoRAConfig(
        rank=4, fmt="int8", merge_aware=True, target_fmt="nf4", targets=".*kernel"
    )
    layers = [nnx.Linear(K, K, rngs=nnx.Rngs(i)) for i in range(2)]
    model = ql.nnx.wrap(nnx.Sequential(*layers), config, rngs=nnx.Rngs(2))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    def loss(model):
        return jnp.mean((model(x) - target) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, nnx.LoRAParam)
        )(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    packed = ql.merge(*ql.nnx.split(model), requantize=True)["layers"]
    y = x
    for layer in packed.values():
        assert layer["kernel"].fmt == "nf4"
        y = ql.apply(layer, None, y)
    packed_loss = jnp.mean((y - target) ** 2)
    assert relative_error(packed_loss, loss(model)) < rounding(4 * K)


def test_state_dicts_keep_the_packing():
    base, lora = make(target_fmt="q4_0")
    state = serialization.to_state_dict(lora)
    restored = serialization.from_state_dict(jax.tree.map(jnp.zeros_like, lora), state)
    assert restored["kernel"].packing == lora["kernel"].packing
    _, other = make(target_fmt="mxfp4")
    with pytest.raises(ValueError, match="settings"):
        serialization.from_state_dict(other, state)
    x = normal(2, (5, K))
    np.testing.assert_array_equal(ql.apply(base, restored, x), ql.apply(base, lora, x))


NAMES = ql.io.Names({"q_proj/kernel": "model.q_proj.weight"})
REFUSALS = {
    "peft_config": (
        lambda base, lora: ql.io.peft_config(base, lora, NAMES),
        r"cannot be written beside their base.*requantize=True.*\n  q_proj/kernel",
    ),
    "save_peft": (
        lambda base, lora: ql.io.save_peft(
            "/nowhere", base, lora, NAMES, ql.io.PeftConfig(target_modules=["q_proj"])
        ),
        r"cannot be written beside their base.*\n  q_proj/kernel",
    ),
    "servers": (
        lambda base, lora: ql.io.PlainLoRA.of(base, lora, NAMES),
        "export others as a merged model",
    ),
    "bank": (lambda base, lora: ql.bank([lora]), "a merge-aware cannot be in a bank"),
    "merge_adapters": (
        lambda base, lora: ql.merge_adapters([lora, lora], [1, 1]),
        "each must be a lora",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_uses_are_refused(name):
    base, lora = make()
    call, words = REFUSALS[name]
    with pytest.raises(ValueError, match=words):
        call({"q_proj": base}, {"q_proj": lora})
