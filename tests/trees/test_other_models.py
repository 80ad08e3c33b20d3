"""Models of plain JAX in the forms of other libraries, and float kernels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, relative_error

import qlora_jax as ql


def trained(lora, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), lora)


class Linear(NamedTuple):
    """A layer as a named tuple, stored `[in, out]`."""

    kernel: Any
    bias: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "bias"),
    meta_fields=("out_features",),
)
@dataclasses.dataclass
class Module:
    """A layer with attributes, as Equinox has them: `[out, in]`."""

    weight: Any
    bias: Any
    out_features: int

    def __call__(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias[None]


@dataclasses.dataclass
class NoPytree:
    """A dataclass that JAX does not know."""

    kernel: Any


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class TestOtherLibraries:
    """Models of plain JAX in the forms that Equinox and Haiku give them."""

    @pytest.mark.slow
    def test_a_model_of_modules(self):
        model = [
            Module(normal(32, 64), normal(32), 32),
            Module(normal(8, 32, seed=1), None, 8),
        ]
        config = ql.QLoRAConfig(rank=2, targets=r"\d/weight", contract="nk")
        base, lora = ql.init(jax.random.key(0), model, config)
        lora = trained(lora)
        assert isinstance(base[0], Module) and base[0].out_features == 32
        assert lora["1"]["weight"].a.shape == (32, 2)
        x = normal(5, 64, seed=2)
        merged = ql.merge(base, lora)
        hidden = merged[0](x)
        want = merged[1](hidden)

        @jax.jit
        def run(base, lora, x):
            x = ql.apply(base[0], lora["0"], x)
            return ql.apply(base[1], lora["1"], x)

        assert relative_error(run(base, lora, x), want) < 1e-5
        float_run = ql.with_float_kernels(lambda model, x: model[1](model[0](x)))
        assert relative_error(float_run(base, lora, x), want) < 1e-6
        tree = ql.combine(base, lora)
        assert isinstance(tree[0].weight, ql.AdaptedKernel)
        again = ql.split(tree)
        assert jax.tree.structure(again) == jax.tree.structure((base, lora))

    def test_a_model_of_flat_keys(self):
        params = {
            "mlp/~/linear_0": {"w": normal(64, 32), "b": normal(32)},
            "mlp/~/linear_1": {"w": normal(32, 8, seed=1), "b": normal(8)},
        }
        config = ql.QLoRAConfig(rank=2, targets=r"mlp/~/.*/w")
        base, lora = ql.init(jax.random.key(0), params, config)
        lora = trained(lora)
        assert list(lora) == list(base) == list(params)
        x = normal(5, 64, seed=2)
        merged = ql.merge(base, lora)
        hidden = want = x
        for name in params:
            hidden = ql.apply(base[name], lora[name], hidden)
            want = want @ merged[name]["w"] + merged[name]["b"][None]
        assert relative_error(hidden, want) < 1e-5
        again = ql.split(ql.combine(base, lora))
        assert jax.tree.structure(again) == jax.tree.structure((base, lora))

    def test_named_tuples_are_layers(self):
        layer = Linear(normal(64, 8), normal(8))
        base, lora = ql.init(jax.random.key(0), layer, ql.QLoRAConfig(rank=2))
        x = normal(3, 64)
        want = x @ ql.dequantize(base).kernel + layer.bias[None]
        assert relative_error(ql.apply(base, lora, x), want) < 1e-5
        assert (
            relative_error(ql.apply(layer, None, x), x @ layer[0] + layer[1][None])
            < 1e-6
        )

    def test_a_float_weight_needs_its_axes(self):
        x, weight = normal(3, 64), normal(8, 64)
        with pytest.raises(ValueError, match="`contract` must say which axes of a fl"):
            ql.apply({"weight": weight}, None, x)
        for contract in (-1, "nk"):
            got = ql.apply({"weight": weight}, None, x, contract=contract)
            assert relative_error(got, x @ weight.T) < 1e-6
        q = ql.quantize(weight, contract="nk")
        assert ql.apply({"weight": q}, None, x, contract="nk").shape == (3, 8)
        with pytest.raises(ValueError, match="fit the kernel's axes 'nk'.* Got 'kn'"):
            ql.apply({"weight": q}, None, x, contract="kn")

    @pytest.mark.parametrize(
        ("base", "lora", "error", "message"),
        [
            ([jnp.ones((64, 8))], None, ValueError, "a dict, a named .* Got list"),
            (NoPytree(1), None, ValueError, "Got NoPytree. Register the dataclass"),
            ({"kernel": None}, None, ValueError, "a kernel must be .* Got NoneType"),
            (
                {"codes": 1, "scales": 2},
                None,
                ValueError,
                "restored without its structure",
            ),
            (
                {"kernel": {"codes": 1, "scales": 2}},
                None,
                ValueError,
                "a kernel must be .* Got dict: was the tree restored",
            ),
            (
                jnp.ones((64, 8)),
                jnp.ones((64, 2)),
                TypeError,
                "`lora` must be a LoRA, or a layer that holds one",
            ),
            ({"weight": 1, "b": 2}, None, ValueError, r"Got \['b', 'weight'\]"),
        ],
    )
    def test_other_layers_are_refused(self, base, lora, error, message):
        with pytest.raises(error, match=message):
            ql.apply(base, lora, jnp.ones((2, 64)))


class TestFloatKernels:
    @pytest.mark.slow
    def test_weights_are_made_again_for_the_backward_pass(self):
        """A layer that needs its weights in float keeps none of them."""
        layers, size = 8, 256
        base = ql.quantize({"kernel": normal(layers, size, size)}, ql.QLoRAConfig())
        lora = ql.init(jax.random.key(0), base, ql.QLoRAConfig(rank=2))[1]
        x = normal(4, size)
        layer = lambda params, x: jnp.tanh(x @ params["kernel"])
        run = ql.with_float_kernels(layer)

        def loss(call, lora, x):
            step = lambda x, both: (call(*both, x), None)
            return jnp.sum(jax.lax.scan(step, x, (base, lora))[0])

        plain = lambda base, lora, x: layer(ql.merge(base, lora), x)
        grads, temporaries = [], []
        for call in (run, plain):
            grad = jax.jit(jax.grad(functools.partial(loss, call), argnums=(0, 1)))
            memory = grad.lower(lora, x).compile().memory_analysis()
            temporaries.append(memory.temp_size_in_bytes)
            grads.append(grad(lora, x))
        close(*grads, 1e-5)
        weights = layers * size * size * 4
        assert temporaries[0] < weights / 2 < weights < temporaries[1]

    def test_flags_stay_python_values(self):
        base = ql.quantize({"kernel": normal(64, 8)}, ql.QLoRAConfig())

        @ql.with_float_kernels
        def run(params, x, scale, *, transpose):
            assert transpose is False and isinstance(scale, float)
            return {"y": x @ params["kernel"] * scale, "name": "run"}

        got = jax.jit(lambda x: run(base, None, x, 2.0, transpose=False)["y"])
        x = normal(3, 64)
        assert relative_error(got(x), 2 * x @ ql.dequantize(base)["kernel"]) < 1e-6
        assert run(base, None, x, 2.0, transpose=False)["name"] == "run"
