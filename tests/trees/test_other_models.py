"""Plain JAX models in the style of other libraries, and float kernels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from helpers import normal, trees_of
from tolerances import assert_close

import qlora_jax as ql


class Linear(NamedTuple):
    kernel: Any
    bias: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias"),
    meta_fields=("out_features",),
)
@dataclasses.dataclass
class Module:
    """A layer with attributes, as in Equinox. Its weight is `[out, in]`."""

    weight: Any
    bias: Any
    out_features: int

    def __call__(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias[None]


@dataclasses.dataclass
class NoPytree:
    kernel: Any


class TestOtherLibraries:
    @pytest.mark.slow
    def test_a_model_of_modules(self):
        first = Module(normal(0, (32, 64)), normal(1, 32), 32)
        model = [first, Module(normal(2, (8, 32)), None, 8)]
        base, lora = trees_of(
            model, rank=2, targets=r"\d/weight", contract="nk", block_size=32
        )
        assert isinstance(base[0], Module) and base[0].out_features == 32
        assert lora["1"]["weight"].a.shape == (32, 2)
        x, merged = normal(3, (5, 64)), ql.merge(base, lora)
        want = merged[1](merged[0](x))

        @jax.jit
        def run(base, lora, x):
            x = ql.apply(base[0], lora["0"], x)
            return ql.apply(base[1], lora["1"], x)

        assert_close(run(base, lora, x), want)
        merged = ql.merge(base, lora)
        assert_close(merged[1](merged[0](x)), want, terms=64)
        tree = ql.combine(base, lora)
        assert isinstance(tree[0].weight, ql.AdaptedKernel)
        again = ql.split(tree)
        assert jax.tree.structure(again) == jax.tree.structure((base, lora))

    def test_a_model_of_flat_keys(self):
        params = {
            "mlp/~/linear_0": {"w": normal(0, (64, 32)), "b": normal(1, 32)},
            "mlp/~/linear_1": {"w": normal(2, (32, 8)), "b": normal(3, 8)},
        }
        base, lora = trees_of(params, rank=2, block_size=32, targets=r"mlp/~/.*/w")
        assert list(lora) == list(base) == list(params)
        x = normal(4, (5, 64))
        merged = ql.merge(base, lora)
        hidden = want = x
        for name in params:
            hidden = ql.apply(base[name], lora[name], hidden)
            want = want @ merged[name]["w"] + merged[name]["b"][None]
        assert_close(hidden, want)
        again = ql.split(ql.combine(base, lora))
        assert jax.tree.structure(again) == jax.tree.structure((base, lora))

    def test_named_tuples_are_layers(self):
        layer, x = Linear(normal(0, (64, 8)), normal(1, 8)), normal(2, (3, 64))
        base, lora = trees_of(layer, rank=2)
        want = x @ ql.merge(base, lora).kernel + layer.bias[None]
        assert_close(ql.apply(base, lora, x), want)
        want = x @ layer.kernel + layer.bias[None]
        assert_close(ql.apply(layer, None, x), want, terms=64)

    def test_a_float_weight_needs_its_axes(self):
        x, weight = normal(0, (3, 64)), normal(1, (8, 64))
        with pytest.raises(ValueError, match="`contract` must say which axes of a fl"):
            ql.apply({"weight": weight}, None, x)
        for contract in (-1, "nk"):
            got = ql.apply({"weight": weight}, None, x, contract=contract)
            assert_close(got, x @ weight.T, terms=64)
        q = ql.quantize(weight, contract="nk")
        assert ql.apply({"weight": q}, None, x, contract="nk").shape == (3, 8)
        with pytest.raises(ValueError, match="fit the kernel's axes 'nk'.* Got 'kn'"):
            ql.apply({"weight": q}, None, x, contract="kn")

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            ([jnp.ones((64, 8))], "a dict, a named .* Got list"),
            (NoPytree(1), "Got NoPytree. Register the dataclass"),
            ({"kernel": None}, "a kernel must be .* Got NoneType"),
            ({"codes": 1, "scales": 2}, "restored without its structure"),
            ({"kernel": {"codes": 1, "scales": 2}},
             "a kernel must be .* Got dict: was the tree restored"),
            ({"weight": 1, "b": 2}, r"Got \['b', 'weight'\]"),
        ],
    )  # fmt: skip
    def test_other_layers_are_refused(self, base, words):
        with pytest.raises(ValueError, match=words):
            ql.apply(base, None, jnp.ones((2, 64)))

    def test_an_array_is_no_adapter(self):
        match = "`lora` must be an adapter"
        with pytest.raises(TypeError, match=match):
            ql.apply(jnp.ones((64, 8)), jnp.ones((64, 2)), jnp.ones((2, 64)))


class TestMergedLayers:
    @pytest.mark.slow
    def test_weights_are_made_again_for_the_backward_pass(self):
        """A layer that decodes its weights does not keep them for the backward pass."""
        layers, size = 8, 256
        base, lora = trees_of({"kernel": normal(0, (layers, size, size))}, rank=2)
        x = normal(1, (4, size))

        def layer(params, x):
            return jnp.tanh(x @ params["kernel"])

        def loss(call, lora, x):
            def step(x, both):
                return (call(*both, x), None)

            return jnp.sum(jax.lax.scan(step, x, (base, lora))[0])

        def run_merged(base, lora, x):
            return layer(ql.merge(base, lora), x)

        grads, temporaries = [], []
        for call in (jax.checkpoint(run_merged), run_merged):
            grad = jax.jit(jax.grad(functools.partial(loss, call), argnums=(0, 1)))
            memory = grad.lower(lora, x).compile().memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            grads.append(grad(lora, x))
        assert_close(*grads)
        weights = layers * size * size * 4
        assert temporaries[0] < weights / 2 < weights < temporaries[1]
