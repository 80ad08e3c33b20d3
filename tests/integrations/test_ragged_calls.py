"""Modules that call `lax.ragged_dot` multiply by packed experts, unchanged."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_and_slow, normal, randomized
from integration_models import LinenStack
from jax import lax
from tolerances import assert_close

import qlora_jax as ql

EXPERTS, DIM, HIDDEN, ROWS = 8, 128, 192, 40
INIT = nn.initializers.lecun_normal(batch_axis=(0,))
SHAPES = {"up": (EXPERTS, DIM, HIDDEN), "down": (EXPERTS, DIM, HIDDEN)}
SIZES = jnp.array([8, 0, 13, 1, 16, 0, 0, 1])
CONFIG = ql.QLoRAConfig(
    rank=4, targets=".*(up|down)", block_size=32, contract={".*/down|down": "bnk"}
)
OF_UP = ql.QLoRAConfig(rank=4, targets="up")
FLOAT_BYTES = 4 * 2 * EXPERTS * DIM * HIDDEN


def products(x, up, down):
    """Two products: one jitted in float32, and one with a kernel `[E, out, in]`."""
    dot = functools.partial(lax.ragged_dot, group_sizes=SIZES)
    wide = functools.partial(dot, preferred_element_type=jnp.float32)
    h = nn.silu(jax.jit(wide)(x, up.astype(x.dtype))).astype(x.dtype)
    return h, dot(h, down.swapaxes(1, 2).astype(x.dtype))


def one_by_one(x, up, down):
    """Indexes the experts one by one, as Tunix's Qwen3 does, each with five rows."""
    rows = enumerate(jnp.split(x, EXPERTS))
    h = [nn.silu(part @ up[i].astype(x.dtype)) for i, part in rows]
    y = [part @ down[i].T.astype(x.dtype) for i, part in enumerate(h)]
    return jnp.concatenate(h), jnp.concatenate(y)


class LinenExperts(nn.Module):
    reads: bool | str = False

    @nn.compact
    def __call__(self, x):
        up, down = (self.param(name, INIT, shape) for name, shape in SHAPES.items())
        h, y = (one_by_one if self.reads == "one" else products)(x, up, down)
        self.sow("sums", "hidden", jnp.sum(h))
        return y * jnp.mean(up) if self.reads is True else y


class Sum(nnx.Variable):
    pass


class Experts(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Param(INIT(rngs.params(), SHAPES["up"]))

    def __call__(self, x):
        return lax.ragged_dot(x, self.up[...], SIZES)


class NNXExperts(nnx.Module):
    def __init__(self, reads=False, *, rngs):
        self.up, self.down = (
            nnx.Param(INIT(rngs.params(), shape)) for shape in SHAPES.values()
        )
        self.hidden, self.reads = Sum(jnp.zeros(())), reads

    def __call__(self, x):
        up, down = self.up[...], self.down[...]
        h, y = (one_by_one if self.reads == "one" else products)(x, up, down)
        self.hidden.set_value(jnp.sum(h).astype(jnp.float32))
        return y * jnp.mean(up) if self.reads is True else y


def linen(reads, config):
    """Returns packed and merged functions of `(lora, x)`, and the initial adapters."""
    model, x = LinenExperts(reads), jnp.ones((ROWS, DIM))
    params = model.init(jax.random.key(0), x)["params"]
    base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
    wrapped = ql.linen.wrap(model)

    def run(model, variables, x):
        return model.apply(variables, x, mutable=["sums"])

    def packed(lora, x):
        y, sums = run(wrapped, {"params": base, "lora": lora}, x)
        return y, sums["sums"]["hidden"][0]

    def merged(lora, x):
        y, sums = run(model, {"params": ql.merge(base, lora)}, x)
        return y, sums["sums"]["hidden"][0]

    return packed, merged, lora


def in_nnx(reads, config):
    """Returns what `linen` returns, for an NNX model."""
    model = NNXExperts(reads, rngs=nnx.Rngs(0))
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    lora = nnx.state(model, nnx.LoRAParam)

    def run(model, x):
        return model(x), model.hidden[...]

    def packed(lora, x):
        inner = nnx.clone(model)
        nnx.update(inner, lora)
        return run(inner, x)

    def merged(lora, x):
        inner = nnx.clone(model)
        nnx.update(inner, lora)
        return run(ql.nnx.merge(inner), x)

    return packed, merged, lora


SETTINGS = {"packed": {}, "trained": {"freeze_base": False}, "float": {"fmt": None}}


@pytest.mark.parametrize("make", [linen, in_nnx])
@pytest.mark.parametrize(
    ("reads", "dtype", "kind"),
    fast_and_slow(
        [(True, "float32", "packed")],
        [
            (False, "float32", "packed"),
            (False, "bfloat16", "packed"),
            (False, "float32", "float"),
            ("one", "float32", "packed"),
        ],
    ),
)
def test_results_and_gradients_are_those_of_merged_weights(make, reads, dtype, kind):
    config = ql.QLoRAConfig(
        **{**{n: getattr(CONFIG, n) for n in ("rank", "targets", "block_size")}},
        contract=dict(CONFIG.contract),
        **SETTINGS[kind],
    )
    packed, merged, lora = make(reads, config)
    lora, x = randomized(lora), normal(1, (ROWS, DIM), dtype)

    def value_and_gradients(run, lora, x):
        def loss(*args):
            return jnp.sum(jnp.square(run(*args)[0].astype(jnp.float32)))

        return run(lora, x), jax.grad(loss, (0, 1))(lora, x)

    lowered = jax.jit(functools.partial(value_and_gradients, packed)).lower(lora, x)
    compiled = lowered.compile()
    if reads == "one":  # XLA on CPUs has floats of several experts side by side
        assert not re.search(rf"<{EXPERTS}x\d\d+x\d\d+xf32>", lowered.as_text())
    else:
        temp = compiled.memory_analysis().temp_size_in_bytes
        assert (temp < FLOAT_BYTES / 2) == (not reads)
    got, want = (
        compiled(lora, x),
        jax.jit(functools.partial(value_and_gradients, merged))(lora, x),
    )
    assert got[0][0].dtype == want[0][0].dtype
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_close(a, b, dtype=dtype, roundings=6)


def test_an_nnx_model_may_be_closed_over():
    model = ql.nnx.wrap(Experts(rngs=nnx.Rngs(0)), OF_UP, rngs=nnx.Rngs(1))
    x = normal(1, (ROWS, DIM))
    gradient = jax.grad(lambda x: jnp.sum(model(x)))(x)
    # B is zero, so the gradient of a row of expert e is the sum of the columns of W_e.
    sums = np.sum(ql.dequantize(model.up.get_value()), -1)  # [E, K]
    assert_close(gradient[:-1], np.repeat(sums, SIZES, axis=0))
    assert not np.any(gradient[-1])  # this row has no expert


@pytest.mark.newest
def test_layers_of_a_scan():
    model, x = LinenStack(LinenExperts, length=2), normal(1, (ROWS, DIM))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    base, lora = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
    lora = randomized(lora)
    want = jax.jit(model.apply)({"params": ql.merge(base, lora)}, x)
    for scanned in ((), "layers"):
        wrapped = ql.linen.wrap(model, scanned=scanned)
        run = jax.jit(wrapped.apply).lower({"params": base, "lora": lora}, x).compile()
        assert run.memory_analysis().temp_size_in_bytes < FLOAT_BYTES / 2
        assert_close(run({"params": base, "lora": lora}, x), want)
