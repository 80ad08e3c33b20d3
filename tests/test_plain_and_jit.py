"""Each public function returns the same result with `jax.jit` and without it.

Other tests check what the functions compute. The functions of `ql.io` read and write
files, and are not traced.
"""

import inspect
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import normal
from tolerances import assert_close

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=2)
# Functions that `jax.jit` cannot trace, and why.
NOT_TRACED = {
    "linen.register": "takes a class of modules",
    "nnx.register": "takes a class of modules",
    "nnx.place": "moves arrays to devices",
    "sharding.place": "moves arrays to devices",
}


class Inputs(NamedTuple):
    """Small arrays, which `jax.jit` traces."""

    key: jax.Array
    params: dict
    base: dict
    lora: dict
    x: jax.Array
    hidden: jax.Array
    head: jax.Array
    scores: jax.Array
    ids: jax.Array


def inputs() -> Inputs:
    params = {"kernel": normal(0, (64, 8)), "bias": normal(1, (8,))}
    base, lora = ql.init(jax.random.key(0), params, CONFIG)
    return Inputs(
        key=jax.random.key(1),
        params=params,
        base=base,
        lora=jax.tree.map(lambda leaf: leaf + 0.1, lora),
        x=normal(2, (4, 64)),
        hidden=normal(3, (4, 8)),
        head=normal(4, (16, 8)),
        scores=normal(5, (4,)),
        ids=jnp.array([3, 0, 15, 3]),
    )


def dense(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None])


def tree(i: Inputs):
    return ql.combine(i.base, i.lora)


def experts(i: Inputs):
    return ql.quantize(jnp.stack([i.params["kernel"], 2 * i.params["kernel"]]))


def table(i: Inputs):
    config = ql.QLoRAConfig(targets=(), trainable_rows={"embedding": [1]})
    base, lora = ql.init(i.key, {"embedding": i.head}, config)
    return base["embedding"], lora["embedding"]


def trained_sum(tree, x):
    return jnp.sum(ql.apply(*ql.split(tree), x))


def linen_layer(i: Inputs):
    model = nn.Dense(8)
    base, lora = ql.linen.init(i.key, model, i.params, CONFIG, i.x)
    variables = {"params": base, "lora": lora}
    return ql.linen.wrap(model).apply(variables, i.x)


def nnx_layer(i: Inputs):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(i.key))
    model.kernel[...] = i.params["kernel"]  # `jit` may round random weights differently
    return ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(i.key))


def nnx_without_adapters(i: Inputs):
    model = nnx_layer(i)
    with ql.nnx.disable_adapters(model):
        return model(i.x)


def nnx_split_and_join(i: Inputs):
    model = nnx_layer(i)
    return ql.nnx.join(model, *ql.nnx.split(model))(i.x)


def update(tx, i: Inputs, **options):
    """Returns the updates alone: rounding may change 8-bit codes in the state."""
    return tx.update(i.lora, tx.init(i.lora), i.lora, **options)[0]


def offloaded_gradient(i: Inputs):
    """Returns a gradient for which the layer's input waits in host memory."""
    policy = ql.memory.offload_layer_inputs()

    @jax.jit
    def loss(params, x):
        def layer(x):
            return dense(params, ql.memory.layer_input(x))

        return jnp.sum(jax.checkpoint(layer, policy=policy)(x))

    return jax.grad(loss)(i.params, i.x)


def attention(i: Inputs):
    q = jnp.broadcast_to(i.x[None, :, None], (1, 4, 2, 64))
    return ql.memory.splash_attention(q, q, q, interpret=True)


CALLS = {
    "apply": lambda i: ql.apply(i.base, i.lora, i.x),
    "bank": lambda i: ql.bank([i.lora, i.lora]),
    "combine": tree,
    "dequantize": lambda i: ql.dequantize(i.base),
    "einsum": lambda i: ql.einsum("bd,dn->bn", i.x, i.base["kernel"]),
    "init": lambda i: ql.init(i.key, i.params, CONFIG),
    "is_packed": lambda i: ql.is_packed(i.base["kernel"]),
    "lookup": lambda i: ql.lookup(*table(i), i.ids),
    "lora_labels": lambda i: jax.tree.map(
        lambda leaf, label: leaf if label == "lora" else 0,
        tree(i),
        ql.lora_labels(tree(i)),
    ),
    "lora_mask": lambda i: ql.lora_mask(tree(i)),
    "matmul": lambda i: ql.matmul(i.x, i.base["kernel"]),
    "merge": lambda i: ql.merge(i.base, i.lora),
    "merge_adapters": lambda i: ql.merge_adapters([i.lora, i.lora], [0.5, 2]),
    "quantize": lambda i: ql.quantize(i.params["kernel"]),
    "ragged_dot": lambda i: ql.ragged_dot(i.x, experts(i), jnp.array([1, 2])),
    "select": lambda i: ql.select(ql.bank([i.lora, i.lora]), i.ids % 2),
    "split": lambda i: ql.split(tree(i)),
    "summary": lambda i: ql.summary(i.base, i.lora).trainable_params,
    "value_and_grad": lambda i: ql.value_and_grad(trained_sum)(tree(i), i.x),
    "linen.init": linen_layer,
    "linen.tiled": lambda i: nn.apply(
        lambda model: ql.linen.tiled(model, 2)(i.x[None]), nn.Dense(8)
    )({"params": i.params}),
    "linen.wrap": linen_layer,
    "losses.chunked_cross_entropy": lambda i: ql.losses.chunked_cross_entropy(
        i.hidden, i.head, i.ids
    ),
    "losses.chunked_kl_divergence": lambda i: ql.losses.chunked_kl_divergence(
        i.hidden, i.head, 2 * i.hidden, i.head
    ),
    "losses.dpo": lambda i: ql.losses.dpo(i.scores, -i.scores),
    "losses.ipo": lambda i: ql.losses.ipo(i.scores, -i.scores),
    "losses.kto": lambda i: ql.losses.kto(i.scores, i.ids > 2, i.scores[0]),
    "losses.orpo": lambda i: ql.losses.orpo(-i.ids - 1.0, -i.ids - 2.0, i.ids + 1.0),
    "losses.simpo": lambda i: ql.losses.simpo(i.scores, -i.scores),
    "losses.soft_cap": lambda i: ql.losses.soft_cap(i.x, 2.0),
    "memory.layer_input": offloaded_gradient,
    "memory.offload_layer_inputs": offloaded_gradient,
    "memory.splash_attention": attention,
    "memory.tiled": lambda i: ql.memory.tiled(jnp.sin, 2)(i.x[None]),
    "memory.to_device": lambda i: ql.memory.to_device(i.base),
    "nnx.disable_adapters": nnx_without_adapters,
    "nnx.join": nnx_split_and_join,
    "nnx.merge": lambda i: ql.nnx.merge(nnx_layer(i))(i.x),
    "nnx.split": lambda i: ql.nnx.split(nnx_layer(i)),
    "nnx.wrap": lambda i: nnx_layer(i)(i.x),
    "optim.offload": lambda i: update(ql.optim.offload(optax.adamw(1e-2)), i),
}


def public_functions() -> set[str]:
    names = set()
    for name in ql.__all__:
        value = getattr(ql, name)
        if inspect.isfunction(value):
            names.add(name)
        elif inspect.ismodule(value) and value is not ql.io:
            inner = {n for n in value.__all__ if inspect.isfunction(getattr(value, n))}
            names |= {f"{name}.{n}" for n in inner}
    return names


def test_every_public_function_is_called():
    assert public_functions() == CALLS.keys() | NOT_TRACED.keys()


@pytest.mark.parametrize("name", CALLS)
def test_jit_as_plain(name, monkeypatch):
    *module, function_name = name.split(".")
    module = getattr(ql, module[0]) if module else ql
    function, calls = getattr(module, function_name), []

    def record_call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, function_name, record_call)
    args = inputs()
    calls.clear()
    want = CALLS[name](args)
    num_plain_calls = len(calls)
    # JAX traces a function only once, and some entries are the same function. So this
    # makes a new one.
    got = jax.jit(lambda args: CALLS[name](args))(args)
    assert 0 < num_plain_calls < len(calls)
    assert_close(got, want)
