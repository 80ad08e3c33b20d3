"""Linen modules in nnx models: `nnx.bridge.ToNNX`, with packed kernels."""

import copy
import functools
import pickle
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal, randomized, refusal
from integration_helpers import CONFIG
from integration_models import NNXMLP, LinenStack
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.slow


def wrap(model, config=CONFIG, *args) -> Any:
    """Wraps a model and moves the adapters away from B = 0."""
    model = ql.nnx.wrap(model, config, *args, rngs=nnx.Rngs(1))
    nnx.update(model, randomized(nnx.state(model, nnx.LoRAParam)))
    return model


class LinenBlock(nn.Module):
    """A Dense, a kernel that the module reads itself, and a variable that changes."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.array(0))
        if self.is_mutable_collection("counts"):
            count.value += 1
        h = nn.Dense(48, name="up")(x)
        w = self.param("down", nn.initializers.normal(0.1), (48, 32))
        return x + nn.silu(h) @ w

    def twice(self, x):
        return self(self(x))


ATTENDS = LinenStack(functools.partial(nn.MultiHeadDotProductAttention, 2), length=2)


class Bridged(nnx.Module):
    def __init__(self, linen: nn.Module, x: jax.Array, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(x.shape[-1], x.shape[-1], rngs=rngs)
        self.linen = nnx.bridge.ToNNX(linen, rngs=rngs).lazy_init(x)

    def __call__(self, x):
        return self.linen(self.proj(x))


BRIDGED: dict[str, Any] = {
    "own": (LinenBlock(), (2, 32), r".*(kernel|down)", 3),
    "attention": (ATTENDS, (2, 5, 32), r".*kernel", 5),
}


@pytest.mark.parametrize("name", BRIDGED)
def test_linen_modules_inside_of_nnx_models(name):
    linen, shape, targets, count = BRIDGED[name]
    x = normal(1, shape)
    model = Bridged(linen, x, rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(rank=2, alpha=4, block_size=16, targets=targets)
    wrapped = wrap(model, config, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert len(nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))) == count
    merged = ql.nnx.merge(wrapped)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    base, lora = ql.nnx.split(wrapped)
    np.testing.assert_array_equal(
        ql.merge(base, lora)["proj"]["kernel"], merged.proj.kernel[...]
    )

    @nnx.jit
    def run(model, x):
        def loss(model, x):
            return jnp.sum(jnp.square(model(x)))

        return nnx.value_and_grad(loss, argnums=(0, 1))(model, x)

    y, (grads, grad_x) = run(wrapped, x)
    expected, (grad_w, expected_x) = run(merged, x)
    assert_close((y, grad_x), (expected, expected_x))
    assert len(leaves_by_path(lora)) == count
    for path in leaves_by_path(lora):
        check_gradient_of_a(path, lora, grads, grad_w)


def check_gradient_of_a(path, lora, grads, grad_w):
    """Checks that A's gradient follows from the merged kernel's."""
    adapter, (*parents, kernel) = leaves_by_path(lora)[path], path.split("/")
    g = dict(nnx.to_flat_state(grad_w))[*parents, kernel].get_value()
    g = np.asarray(adapter.geometry.to_matrix(g))
    grad_a = dict(nnx.to_flat_state(grads))[*parents, f"{kernel}_lora", "a"]
    assert_close(grad_a.get_value(), 2 * g @ np.swapaxes(np.asarray(adapter.b), -1, -2))


def make_bridged(**config):
    x = normal(1, (2, 32))
    config = {"rank": 2, "block_size": 16, "targets": r".*(kernel|down)", **config}
    model = Bridged(LinenBlock(), x, rngs=nnx.Rngs(0))
    return wrap(model, ql.QLoRAConfig(**config), x), x


def test_a_bridge_keeps_methods_and_variables_that_change():
    wrapped, x = make_bridged()
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped.linen.twice(x), merged.linen.twice(x))
    for _ in range(2):
        wrapped.linen(x, mutable=["counts"])
    assert int(wrapped.linen.calls[...]) == int(merged.linen.calls[...]) + 2
    assert_close(wrapped(x), merged(x))
    wrapped.linen(x, mutable=["params"])
    assert_close(wrapped(x), merged(x))


def assert_no_float_kernel_is_kept(wrapped, x):
    graphdef, state = nnx.split(wrapped)

    def own_trees():
        return jax.tree.map(lambda v: v, state)  # variables of this trace

    _, pullback = jax.vjp(lambda x: nnx.merge(graphdef, own_trees())(x), x)
    sizes = [x.size for x in jax.tree.leaves(pullback) if x.dtype != jnp.uint8]
    assert max(sizes) < 32 * 32


def test_a_bridge_keeps_no_float_kernels_for_the_backward_pass():
    assert_no_float_kernel_is_kept(*make_bridged())


def test_dropout_in_a_bridge_follows_train_and_eval():
    wrapped, x = make_bridged(dropout=0.5, targets="linen/up/kernel")
    assert not np.array_equal(wrapped(x), wrapped(x))
    with ql.nnx.disable_adapters(wrapped):
        base = wrapped(x)
        np.testing.assert_array_equal(wrapped(x), base)
    wrapped.eval()
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    zero = jax.tree.map(jnp.zeros_like, nnx.state(wrapped, nnx.LoRAParam))
    nnx.update(wrapped, zero)
    assert_close(base, wrapped(x))
    with pytest.raises(ValueError, match="linen/down: .*no dropout can act"):
        make_bridged(dropout=0.5)


def test_kernels_of_linen_modules_need_a_sample_call_or_contract():
    x = normal(1, (2, 5, 32))
    model = Bridged(ATTENDS, x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="query/kernel: .*which of its 4 axes"):
        wrap(model)
    contract = {".*/(query|key|value)/kernel": -3, ".*/out/kernel": (-3, -2)}
    wrapped = wrap(model, ql.QLoRAConfig(rank=2, contract=contract, block_size=16))
    traced = wrap(model, ql.QLoRAConfig(rank=2, block_size=16), x)
    both = nnx.state(wrapped), nnx.state(traced)
    chex.assert_trees_all_equal_structs(*both)
    assert_close(wrapped(x), traced(x))


def test_a_bridge_that_the_sample_call_skips_is_named():
    class Branches(nnx.Module):
        def __init__(self, x):
            self.used = Bridged(ATTENDS, x, rngs=nnx.Rngs(0))
            self.skipped = Bridged(ATTENDS, x, rngs=nnx.Rngs(1))

        def __call__(self, x, use_both=False):
            return self.skipped(self.used(x)) if use_both else self.used(x)

    x = normal(1, (2, 5, 32))
    model, config = Branches(x), ql.QLoRAConfig(rank=2, block_size=16)
    text = refusal(
        lambda: wrap(model, config, x), "query/kernel: only its linen module"
    )
    assert "  skipped" in text and "  used" not in text
    wrapped = wrap(model, config, x, True)
    assert_close(wrapped(x, True), ql.nnx.merge(wrapped)(x, True))


def test_a_bridge_is_copied():
    x = normal(1, (2, 5, 32))
    model = Bridged(ATTENDS, x, rngs=nnx.Rngs(0))
    wrapped = wrap(model, ql.QLoRAConfig(rank=2, block_size=16), x)
    for copied in (lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, nnx.clone):
        np.testing.assert_array_equal(copied(wrapped)(x), wrapped(x))


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.mlp = NNXMLP(rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(x)


class Decoder(nn.Module):
    """A linen decoder made of nnx layers, as in MaxText."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nnx.bridge.to_linen(Layer, name=f"layers_{i}")(x)
        return nn.Dense(8, name="head")(x)


@pytest.mark.parametrize("has_sample", [False, True])
def test_nnx_layers_of_a_linen_decoder_in_an_nnx_model(has_sample):
    x = normal(1, (2, 64))
    model = Bridged(Decoder(), x, rngs=nnx.Rngs(0))
    wrapped = wrap(model, CONFIG, *([x] if has_sample else []))
    assert len(nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))) == 8
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped(x), merged(x))

    def loss(model, x):
        return jnp.sum(jnp.square(model(x)))

    grads, grad_w = nnx.grad(loss)(wrapped, x), nnx.grad(loss)(merged, x)
    lora = ql.nnx.split(wrapped)[1]
    check_gradient_of_a("linen/layers_1/mlp/up/kernel", lora, grads, grad_w)
    assert_no_float_kernel_is_kept(wrapped, x)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [
        ("proj/kernel", {"trainable": "linen/up/bias"}),
        ("linen/down", {"trainable": "linen/up/(kernel|bias)"}),
        ("linen/up/kernel", {"trainable_rows": {"linen/down": [3, 5]}}),
    ],
)
def test_a_bridge_runs_leaves_that_are_trained_in_full_or_by_rows(targets, trained):
    wrapped, x = make_bridged(targets=targets, **trained)
    merged = ql.nnx.merge(wrapped)

    def loss(model):
        return jnp.sum(jnp.square(model(x)))

    assert_close(loss(wrapped), loss(merged))
    lora = leaves_by_path(ql.nnx.split(wrapped)[1])
    expected = dict(nnx.to_flat_state(nnx.grad(loss)(merged)))
    variables = nnx.DiffState(0, nnx.LoRAParam)
    grads = dict(nnx.to_flat_state(nnx.grad(loss, argnums=variables)(wrapped)))
    replaced = {path: x for path, x in lora.items() if x.label != "lora"}
    assert replaced
    for path, adapter in replaced.items():
        *parents, name = path.split("/")
        gradient = np.asarray(expected[*parents, name].get_value())
        if rows := adapter.replaced_rows:
            gradient, parents, name = (
                gradient[[*rows]],
                [*parents, f"{name}_lora"],
                "rows",
            )
        assert_close(grads[*parents, name].get_value(), gradient)


@pytest.mark.parametrize("options", [{"freeze_base": False}, {"fmt": None}])
def test_a_bridge_runs_kernels_that_are_trained_or_in_float(options):
    wrapped, x = make_bridged(**options)
    merged = ql.nnx.merge(wrapped)

    def loss(model):
        return jnp.sum(jnp.square(model(x)))

    assert_close(loss(wrapped), loss(merged))
    grads = dict(nnx.to_flat_state(nnx.grad(loss)(wrapped)))
    expected = dict(nnx.to_flat_state(nnx.grad(loss)(merged)))
    for path in (("linen", "up", "kernel"), ("linen", "down")):
        assert_close(grads[path].get_value(), expected[path].get_value())
