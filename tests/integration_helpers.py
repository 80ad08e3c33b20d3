"""Both Flax integrations behind one interface: pure functions of pytrees."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from helpers import biases, normal, put, randomized
from integration_pairs import PAIRS, TABLES
from tolerances import assert_close

import qlora_jax as ql

TARGETS = r"(.*/)?(kernel|w|gate|up|embedding)"
CONFIG = ql.QLoRAConfig(rank=4, alpha=8, block_size=16, targets=TARGETS)
DROPOUT = dataclasses.replace(CONFIG, dropout=0.5)


class Wrapped:
    """A wrapped model as pure functions.

    The functions take its adapters, `lora`, in which B = 0, and `base`, all other
    state: packed kernels, biases and, in NNX, dropout streams. `apply(lora, base, x,
    dropout)` applies dropout if it gets a seed, `trees` returns the base and the lora
    tree, `merge` the merged parameters as nested dicts. `plain(params, x)` runs the
    model without adapters.
    """

    def merged(self, lora, base, x):
        """Returns the output of the plain model on the merged parameters."""
        return self.plain(self.merge(lora, base), x)

    def check(self, lora, x):
        """Compares output and gradients with the plain model's on merged parameters."""
        packed = value_and_gradients(self.apply, self.base)
        merged = value_and_gradients(self.merged, self.base)
        assert_close(packed(lora, x), merged(lora, x))
        return packed, merged


class LinenWrapped(Wrapped):
    def __init__(self, model, base, lora, wrapped=None):
        self.model, self.base, self.lora = model, base, lora
        scanned = getattr(model, "scanned", ())
        self.wrapped = wrapped or ql.linen.wrap(model, scanned=scanned)

    def apply(self, lora, base, x, dropout=None):
        rngs = {} if dropout is None else {"dropout": jax.random.key(dropout)}
        return self.wrapped.apply({"params": base, "lora": lora}, x, rngs=rngs)

    def trees(self, lora, base):
        return base, lora

    def merge(self, lora, base):
        return ql.merge(base, lora)

    def plain(self, params, x):
        return self.model.apply({"params": params}, x)

    def copied(self, copy):
        wrapped, base, lora = copy((self.wrapped, self.base, self.lora))
        assert wrapped == self.wrapped
        return LinenWrapped(self.model, base, lora, wrapped)


class Linen:
    name = "linen"
    register = staticmethod(ql.linen.register)

    @staticmethod
    def make(pair, place=lambda params: params, **options):
        """Returns a model and its parameters, perhaps placed, with nonzero biases."""
        model = pair.linen(**options)
        x = jnp.zeros(pair.shape)
        params = model.init(jax.random.key(0), x)["params"]
        return model, place(put(params, randomized(biases(params))))

    @staticmethod
    def wrap(model_and_params, config, x):
        model, params = model_and_params
        base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
        return LinenWrapped(model, base, lora)


class NNXWrapped(Wrapped):
    def __init__(self, model, wrapped):
        self.float_model, self.original = model, nnx.split(model)
        self.graphdef, self.lora, self.base = nnx.split(wrapped, nnx.LoRAParam, ...)

    def model(self, lora, base) -> Any:
        fresh = jax.tree.map(lambda x: x, (lora, base))  # variables of this trace
        return nnx.merge(self.graphdef, *fresh)

    def apply(self, lora, base, x, dropout=None):
        model = self.model(lora, base)
        if dropout is None:
            model.eval()
        else:
            model.train()
            counts = nnx.state(model, nnx.RngCount)
            nnx.update(model, jax.tree.map(lambda n: n + dropout, counts))
        return model(x)

    def trees(self, lora, base):
        return ql.nnx.split(self.model(lora, base))

    def merge(self, lora, base):
        merged = ql.nnx.merge(self.model(lora, base))
        return nnx.to_pure_dict(nnx.state(merged, nnx.Param))

    def plain(self, params, x):
        graphdef, state = self.original
        state = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(x)

    def copied(self, copy):
        again = NNXWrapped(self.float_model, copy(self.model(self.lora, self.base)))
        assert again.graphdef == self.graphdef
        return again


class NNX:
    name = "nnx"
    register = staticmethod(ql.nnx.register)

    @staticmethod
    def make(pair, place=lambda params: params, **options):
        """Returns a model, its parameters perhaps placed, with nonzero biases."""
        model = pair.nnx(rngs=nnx.Rngs(0), **options)
        state = nnx.state(model, nnx.Param)
        state = put(state, randomized(biases(state)))
        nnx.replace_by_pure_dict(state, place(nnx.to_pure_dict(state)))
        nnx.update(model, state)
        return model

    @staticmethod
    def wrap(model, config, x):
        del x
        return NNXWrapped(model, ql.nnx.wrap(model, config, rngs=nnx.Rngs(1)))


INTEGRATIONS = {"linen": Linen, "nnx": NNX}


def leaves_at(tree, paths):
    """Returns the single array at or below each path."""

    def path_text(keys):
        return f"{jax.tree_util.keystr(keys, simple=True, separator='/')}/"

    flat = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {
        path: [x for q, x in flat if path_text(q).startswith(f"{path}/")]
        for path in paths
    }
    return {path: leaf for path, (leaf,) in leaves.items()}


def make_x(pair, dtype=jnp.float32):
    return normal(0, pair.shape, dtype)


@functools.cache
def build(flax, name, config=CONFIG):
    """Returns a wrapped model, adapters in which B is not zero, and an input."""
    pair = (PAIRS | TABLES)[name]
    x = make_x(pair)
    wrapped = flax.wrap(flax.make(pair), config, x)
    return wrapped, randomized(wrapped.lora), x


def value_and_gradients(apply, base):
    """Returns a function that gives the output and the gradients of a model."""

    def loss(lora, x, biases):
        y = apply(lora, put(base, biases), x)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    return lambda lora, x: run(lora, x, biases(base))


def refused(error):
    """Returns the paths that an error lists, one per line."""
    lines = str(error.value).splitlines()[1:]
    return {line.strip().partition(":")[0] for line in lines}
