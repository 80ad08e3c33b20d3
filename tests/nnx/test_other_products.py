"""Modules that compute something else with their kernel than their class does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from helpers import normal, randomized, refusal
from integration_helpers import TARGETS
from tolerances import assert_close

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=4, block_size=16, targets=TARGETS + "|.*raw")


def wrap(model, config=CONFIG) -> Any:
    wrapped = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    nnx.update(wrapped, randomized(nnx.state(wrapped, nnx.LoRAParam)))
    return wrapped


def twice(fn):
    return lambda *args, **kwargs: 2 * fn(*args, **kwargs)


def promote_doubled(arrays, **options):
    inputs, kernel, bias = promote_dtype(arrays, **options)
    return inputs, 2 * kernel, bias


def promote_rolled(tables, **options):
    return [jnp.roll(table, 1, 0) for table in promote_dtype(tables, **options)]


class OtherAttribute(nnx.Linear):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return 2 * value[...] if name == "kernel" else value


class Heads(nnx.Module):
    """A class that is registered, whose call uses another method."""

    def __init__(self, *sizes, rngs):
        self.w = nnx.Param(rngs.params.normal(sizes))

    def weights(self):
        return self.w[...]

    def __call__(self, x):
        return jnp.einsum("btk,kn->btn", x, self.weights())


class NormalizedHeads(Heads):
    def weights(self):
        return super().weights() / jnp.linalg.norm(self.w[...])


class Standardized(nnx.Linear):
    """Its call reads its weights in a property, which reads another property."""

    def __init__(self, *sizes, rngs):
        nnx.Module.__init__(self)
        layer = nnx.Linear(*sizes, rngs=rngs)
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "kernel":
                setattr(self, name, value)
        self.raw = nnx.Param(layer.kernel[...])

    @property
    def centered(self):
        return self.raw[...] - self.raw[...].mean(0, keepdims=True)

    @property
    def kernel(self):
        return self.centered / jnp.linalg.norm(self.centered)


class ReadFromOutside(nnx.Module):
    def __init__(self, *sizes, rngs):
        self.inner = Standardized(*sizes, rngs=rngs)

    def __call__(self, x):
        return x @ self.inner.kernel


class ReplacesKernel(nnx.Linear):
    def __call__(self, inputs, out_sharding=None):
        kernel = self.kernel
        self.kernel = nnx.Param(kernel[...] - kernel[...].mean(0, keepdims=True))
        y = super().__call__(inputs)
        self.kernel = kernel
        return y


def linear(cls, **options):
    return cls(64, 16, rngs=nnx.Rngs(0), **options)


def einsum(cls=nnx.Einsum, **options):
    return cls("btd,df->btf", (64, 16), (16,), rngs=nnx.Rngs(0), **options)


DOUBLED = twice(jax.lax.dot_general)
ql.nnx.register(Heads, kernel="w", einsum="btk,kn->btn")
MODELS = {
    "dot_general": lambda: linear(nnx.Linear, dot_general=DOUBLED),
    "general": lambda: linear(nnx.LinearGeneral, dot_general=DOUBLED),
    "class": lambda: linear(nnx.LinearGeneral, dot_general_cls=lambda: DOUBLED),
    "einsum_op": lambda: einsum(einsum_op=twice(jnp.einsum)),
    "promote": lambda: linear(nnx.Linear, promote_dtype=promote_doubled),
    "promote einsum": lambda: einsum(promote_dtype=promote_doubled),
    "attribute": lambda: linear(OtherAttribute),
    "method": lambda: linear(NormalizedHeads),
    "property": lambda: linear(Standardized),
    "outer module": lambda: linear(ReadFromOutside),
    "replaced": lambda: linear(ReplacesKernel),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_that_computes_otherwise_gets_float_weights(name):
    """Outputs and gradients are those of the plain class on the merged weights."""
    wrapped, x = wrap(MODELS[name]()), normal(1, (2, 5, 64))
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped(x), merged(x))

    def gradient(model):
        graph, state = nnx.split(model)
        return jax.grad(lambda x: jnp.sum(jnp.sin(nnx.merge(graph, state)(x))))(x)

    assert_close(gradient(wrapped), gradient(merged))
    config = ql.QLoRAConfig(rank=4, dropout=0.1, targets=r"(.*/)?(kernel|raw|w)")
    text = refusal(lambda: wrap(MODELS[name](), config), "reads it itself", "xclude it")
    # Registered as an einsum of its weights, a layer of Flax would be another one.
    assert "register" not in text or name == "method"


@pytest.mark.parametrize("method", ["__call__", "attend"])
def test_a_table_whose_rows_are_not_those_that_are_stored(method):
    embed = nnx.Embed(48, 32, promote_dtype=promote_rolled, rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(targets=(), trainable_rows={"embedding": [0, 3]})
    wrapped = wrap(embed, config)
    x = np.array([[3, 0, 47]]) if method == "__call__" else normal(1, (2, 32))
    got, want = (getattr(m, method)(x) for m in (wrapped, ql.nnx.merge(wrapped)))
    assert_close(got, want)


class Product(nnx.Module):
    """A class to register, with other parameters or another result than its einsum."""

    sizes = 32, 32

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal(self.sizes))
        self.bias = nnx.Param(jnp.zeros(self.sizes[1]))  # as initialized
        self.mean = nnx.BatchStat(jnp.zeros(()))
        self.unread = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
        return jnp.einsum("btk,kn->btn", x, self.w[...])


class AddsBias(Product):
    def __call__(self, x):
        return super().__call__(x) + self.bias[...].reshape(1, 1, -1)


class SubtractsMean(Product):
    def __call__(self, x):
        return super().__call__(x - self.mean[...].reshape(1, 1, 1))


class Scales(Product):
    def __call__(self, x):
        return super().__call__(x) / 4


class Transposes(Product):
    def __call__(self, x):
        return x @ self.w[...].T


class Activates(Product):
    def __call__(self, x):
        return jnp.tanh(super().__call__(x))


@pytest.mark.parametrize("is_stack", [False, True])
@pytest.mark.parametrize(
    "base", [AddsBias, SubtractsMean, Scales, Transposes, Activates, Product]
)
def test_a_registered_class_must_compute_its_einsum_alone(base, is_stack):
    cls = type(f"{base.__name__}Registered", (base,), {"__call__": base.__call__})
    ql.nnx.register(cls, kernel="w", einsum="btk,kn->btn")
    make = nnx.split_rngs(splits=2)(nnx.vmap(cls)) if is_stack else cls
    config = ql.QLoRAConfig(rank=4, block_size=16, targets="w", dropout=0.1)
    run = functools.partial(wrap, make(nnx.Rngs(0)), config)
    if base is not Product:
        refusal(run, "w: ", cls.__name__, "btk,kn->btn")
        return
    wrapped = run()
    wrapped.eval()
    if not is_stack:
        x = normal(1, (2, 5, 32))
        assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
