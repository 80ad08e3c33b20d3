"""One contract for both Flax integrations: layers that have adapters of their own."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, fast_and_slow, randomized
from integration_helpers import CONFIG, INTEGRATIONS, make_x
from integration_pairs import DIM, LAYERS, PAIRS, SEQUENCE, Pair, dense, stack

import qlora_jax as ql

pytestmark = pytest.mark.parametrize(
    "flax", INTEGRATIONS.values(), ids=list(INTEGRATIONS)
)
DENSE = PAIRS["dense"]
OWN = ql.QLoRAConfig(rank=4, alpha=8, block_size=16, double_quant=False)


def layers(config, features=24):
    linen = functools.partial(ql.linen.QLoRADense, features, config)
    return linen, functools.partial(ql.nnx.QLoRALinear, DIM, features, config)


def adopt(flax, config, **options):
    own = Pair(*layers(config), *DENSE[2:])
    return flax.adopt(own, DENSE, bias_init=nn.initializers.normal(), **options)


SETTINGS = {fmt: {"fmt": fmt} for fmt in ("nf4", "fp4", "int4", "int8")}
SETTINGS["dora"] = {"use_dora": True}


@pytest.mark.parametrize(
    "name", fast_and_slow(["nf4"], [name for name in SETTINGS if name != "nf4"])
)
def test_it_is_the_dense_layer_with_its_kernel_packed(flax, name):
    config = dataclasses.replace(OWN, **SETTINGS[name])
    wrapped, x = adopt(flax, config), make_x(DENSE)
    base, adapters = wrapped.trees(wrapped.lora, wrapped.rest)
    q, adapter = base["kernel"], adapters["kernel"]
    assert (q.fmt, q.block_size, q.double_quant) == (config.fmt, 16, False)
    assert (adapter.a.shape, adapter.b.shape) == ((DIM, 4), (4, 24))
    assert adapter.scaling == 2 and not np.any(adapter.b)
    wrapped.check(randomized(wrapped.lora), x)


def test_its_kernel_starts_as_that_of_the_dense_layer(flax):
    plain, packed = (
        adopt(flax, dataclasses.replace(OWN, fmt=f)) for f in (None, "nf4")
    )
    w, q = (w.trees(w.lora, w.rest)[0]["kernel"] for w in (plain, packed))
    want = ql.quantize(w, block_size=16, double_quant=False)
    np.testing.assert_array_equal(q.codes, want.codes)
    assert 0.8 < np.std(w) * DIM**0.5 < 1.2  # LeCun's


@pytest.mark.slow
def test_dtypes_precision_and_settings_are_respected(flax):
    settings, low = {"rank_stabilized": True, "lora_dtype": "bfloat16"}, jnp.bfloat16
    config = dataclasses.replace(OWN, **settings)
    wrapped = adopt(flax, config, dtype=low, param_dtype=low, precision="highest")
    base, adapters = wrapped.trees(wrapped.lora, wrapped.rest)
    assert base["kernel"].dtype == base["bias"].dtype == low
    adapter, x = adapters["kernel"], make_x(DENSE)
    assert adapter.scaling == 8 / 4**0.5
    assert adapter.a.dtype == adapter.b.dtype == low
    arguments = wrapped.lora, wrapped.rest, x
    close(wrapped.apply(*arguments), wrapped.merged(*arguments), 5e-3)
    jaxpr = str(jax.make_jaxpr(wrapped.apply)(*arguments))
    assert jaxpr.count("Precision.HIGHEST") >= 3


@pytest.mark.slow
def test_it_trains_its_base_where_asked(flax):
    config, x = dataclasses.replace(OWN, freeze_base=False), make_x(DENSE)
    wrapped = adopt(flax, config)

    loss = lambda apply: lambda weights: jnp.sum(jnp.sin(apply(weights)))
    packed = lambda rest: wrapped.apply(wrapped.lora, rest, x)
    plain = lambda params: wrapped.plain(params, x)
    merged = wrapped.merge(wrapped.lora, wrapped.rest)
    found, want = jax.grad(loss(packed))(wrapped.rest), jax.grad(loss(plain))(merged)
    by_size = lambda tree: sorted(jax.tree.leaves(tree), key=lambda leaf: leaf.size)
    close(by_size(found), by_size(want))


def test_dropout_is_on_when_asked_for(flax):
    wrapped = adopt(flax, dataclasses.replace(OWN, dropout=0.5))
    lora, rest, x = randomized(wrapped.lora), wrapped.rest, make_x(DENSE)
    off, on = wrapped.apply(lora, rest, x), wrapped.apply(lora, rest, x, dropout=0)
    close(off, wrapped.merged(lora, rest, x))
    assert not np.allclose(off, on)


@pytest.mark.slow
def test_in_a_scan_under_jit_grad_and_vmap(flax):
    made = layers(CONFIG, DIM), dense(DIM)
    own, plain = (Pair(*stack(*both), SEQUENCE, {}) for both in made)
    wrapped = flax.adopt(own, plain)
    base, _ = wrapped.trees(wrapped.lora, wrapped.rest)
    kernel = base["layers"]["layer"]["kernel"]
    assert kernel.shape == (LAYERS, DIM, DIM)
    assert len(np.unique(kernel.codes, axis=0)) == LAYERS
    lora, xs = randomized(wrapped.lora), make_x(own)

    def run(apply):
        loss = lambda lora, x: jnp.sum(jnp.sin(apply(lora, wrapped.rest, x)))
        grads = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), (None, 0))
        return jax.jit(grads)(lora, xs)

    close(run(wrapped.apply), run(wrapped.merged), 1e-4)


@pytest.mark.parametrize(
    "settings",
    [{"exclude": "kernel"}, {"targets": "w"}, {"rank_pattern": {".*": 2}},
     {"contract": {"kernel": -1}}],
)  # fmt: skip
def test_configs_that_name_other_leaves_are_refused(flax, settings):
    with pytest.raises(ValueError, match="must target 'kernel' and have no settings"):
        adopt(flax, ql.QLoRAConfig(**settings))
