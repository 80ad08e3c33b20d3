"""The adapter and its config. test_golden.py compares with PEFT's golden files."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from jax.sharding import PartitionSpec
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.adapters import lora as lora_module
from qlora_jax.adapters.create import new_adapter
from qlora_jax.adapters.lora import lora_product
from qlora_jax.product import floats
from qlora_jax.product.floats import LARGEST_UNSWAPPED
from qlora_jax.quant.geometry import Geometry
from qlora_jax.quant.kernel import FloatKernel

# Without a mesh, `lora_product` does not depend on it.
KERNEL = FloatKernel(np.zeros((64, 24), np.float32), Geometry())


def make_lora(k=64, n=24):
    kernel = FloatKernel(jnp.zeros((k, n)), Geometry())
    config = ql.QLoRAConfig(rank=4, alpha=8)
    lora = new_adapter(jax.random.key(0), kernel, config, "kernel")
    return dataclasses.replace(lora, b=normal(0, (4, n)))


def awkward_values():
    """Float32 values: ties, subnormals, zeros, infinities, NaN, and many magnitudes."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000
    near = np.concatenate([ties, ties - 1, ties + 1, ties - 0x8000])
    return np.concatenate([bits, near]).view(np.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_weights_are_cast_to_the_bits_of_a_plain_cast(dtype, jit):
    w = jnp.asarray(awkward_values())
    cast = functools.partial(lora_module.cast, dtype=jnp.dtype(dtype))
    got = np.asarray((jax.jit(cast) if jit else cast)(w))
    with np.errstate(all="ignore"):
        want = awkward_values().astype(jnp.dtype(dtype))
    is_number = ~np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), ~is_number)

    def bits(x):
        return x[is_number].view(f"uint{8 * x.itemsize}")

    np.testing.assert_array_equal(bits(got), bits(want))


def test_gradients_pass_the_cast_unchanged():
    x = normal(1, (3, 64), jnp.bfloat16)

    def plain(lora):
        h = floats.float_product(x, lora.a.astype(x.dtype)).astype(x.dtype)
        return 2.0 * floats.float_product(h, lora.b.astype(x.dtype))

    def square(run):
        return lambda lora: jnp.sum(run(lora) ** 2)

    got = jax.grad(square(lambda lora: lora_product(x, lora, KERNEL)))(make_lora())
    want = jax.grad(square(plain))(make_lora())
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("rows", [(), (3,), (2, 5), (2, 4, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_local", [False, True], ids=["global", "local"])
def test_gradients_of_a_and_b_are_products(rows, dtype, is_local):
    """With many rows, the gradient of A is computed transposed."""
    k, n = 256, 24
    assert (np.prod(rows) * k > LARGEST_UNSWAPPED) == (len(rows) == 3)
    lora, x, g = make_lora(k, n), normal(1, (*rows, k), dtype), normal(2, (*rows, n))

    def gradient(lora, x, g):
        return jax.grad(lambda lora: jnp.vdot(lora_product(x, lora, KERNEL), g))(lora)

    if is_local:
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
        specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
        gradient = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))
    got = gradient(lora, x, g)
    a, b, x, g = (np.asarray(v, np.float64) for v in (lora.a, lora.b, x, g))
    x, g = x.reshape(-1, k), g.reshape(-1, n)
    # In 16 bits, the inner product is rounded before the outer one is.
    bound = {"terms": len(x) + k, "roundings": 2, "dtype": dtype}
    assert_close(got.a, 2.0 * x.T @ (g @ b.T), **bound)
    assert_close(got.b, 2.0 * (x @ a).T @ g, **bound)


def test_defaults_are_the_references():
    config = ql.QLoRAConfig()
    assert config.fmt == "nf4" and config.block_size == 64
    assert config.double_quant and config.freeze_base
    assert config.rank == 16 and config.alpha is None and config.exclude == ()
    assert config.dropout == 0 and not config.rank_stabilized
    assert config.is_target("a/kernel") and config.is_target("kernel")
    assert not config.is_target("a/kernel/b") and not config.is_target("akernel")
    assert config.scaling_of("kernel") == 1.0  # alpha defaults to the rank


def test_a_config_is_a_static_argument():
    settings = {"targets": ["a", "b"], "contract": {"a": [-3, -2]}}
    config, equal_config = (
        ql.QLoRAConfig(rank_pattern={"a": 2}, **settings) for _ in range(2)
    )
    assert config == equal_config and hash(config) == hash(equal_config)
    assert config != ql.QLoRAConfig(rank_pattern={"a": 3}, **settings)
    # The first pattern that matches wins, so the order of patterns matters.
    first, last = ({"a.*": 2, ".*b": 4}, {".*b": 4, "a.*": 2})
    assert first == last
    assert ql.QLoRAConfig(rank_pattern=first) != ql.QLoRAConfig(rank_pattern=last)
    params = {"kernel": jnp.ones((64, 2))}
    q = jax.jit(ql.quantize, static_argnums=1)(params, ql.QLoRAConfig(fmt="int4"))
    assert q["kernel"].fmt == "int4"
    patterns = {"a": 2}
    config = ql.QLoRAConfig(rank_pattern=patterns)
    patterns["a"] = 3
    assert config.rank_of("a") == 2


def test_numbers_of_numpy_and_compiled_patterns_are_taken():
    patterns = [re.compile(r".*Q_proj/kernel", re.IGNORECASE), "o/kernel"]
    config = ql.QLoRAConfig(
        rank=np.int64(4),
        alpha=np.float32(2),
        targets=patterns,
        rank_pattern={re.compile("o/.*"): np.int32(2)},
        contract=-1,
    )
    assert config.rank_of("q") == 4 and config.scaling_of("q") == 0.5
    assert type(config.rank) is int and type(config.alpha) is float
    assert config.is_target("a/q_proj/kernel") and config.rank_of("o/kernel") == 2
    assert not config.is_target("a/o/kernel")
    assert config.contract_of("any/path") == (-1,)
    assert hash(config) == hash(dataclasses.replace(config))


def test_sequences_of_numbers_are_taken():
    config = ql.QLoRAConfig(trainable_rows={"iterators": map(int, "53")})
    assert config.rows_of("iterators") == (3, 5)


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 16, "alpha": 8}, 0.5),
        ({"rank": 16, "alpha": 8, "rank_stabilized": True}, 2.0),
        ({"rank": 8, "rank_pattern": {"a/.*": 2}, "alpha": 4}, 2.0),
        ({"rank": 8, "rank_pattern": {"b/.*": 2}, "alpha": 4}, 0.5),
        ({"rank": 8, "alpha_pattern": {"a/k": 2, "a/.*": 4}}, 0.25),
    ],
)
def test_scaling(settings, scaling):
    """alpha / rank, or alpha / sqrt(rank); the first pattern that matches wins."""
    assert ql.QLoRAConfig(**settings).scaling_of("a/k") == scaling


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"trainable_rows": {"e": [2, 2]}},
            ValueError,
            "distinct integers from 0. Got .2, 2",
        ),
        ({"trainable_rows": {"e": [True]}}, ValueError, r"integers .* Got \[True\]"),
        ({"freeze_base": "no"}, ValueError, "`freeze_base` must be .* Got 'no'."),
        ({"use_dora": None}, ValueError, "`use_dora` must be True or .* Got None."),
        ({"rank_stabilized": "no"}, ValueError, "`rank_stabilized` must be True or"),
        ({"merge_aware": "no"}, ValueError, "`merge_aware` must be True or False"),
        ({"double_quant": "no"}, ValueError, "`double_quant` must be True or False"),
        ({"fmt": ""}, ValueError, "`fmt` must be one of"),
        ({"lora_dtype": None}, TypeError, "`lora_dtype` must be .* Got None."),
        ({"lora_dtype": "fp8"}, TypeError, "`lora_dtype` must be .* Got 'fp8'."),
        ({"trainable_rows": {"e": 2}}, ValueError, "`trainable_rows`: .* Got 2."),
        ({"rank": 0}, ValueError, "`rank` must be a positive integer. Got 0."),
        ({"rank": 2.0}, ValueError, "`rank` must be a positive integer. Got 2.0."),
        ({"rank": True}, ValueError, "`rank` must be a positive integer. Got True."),
        ({"rank_pattern": {"a": -1}}, ValueError, "positive integer. Got -1."),
        ({"rank": np.float32(2)}, ValueError, "`rank` must be a positive integer"),
        ({"alpha": 0}, ValueError, "`alpha` must be a positive, finite number. Got 0"),
        ({"alpha": "8"}, ValueError, "positive, finite number. Got '8'."),
        ({"alpha": np.inf}, ValueError, "positive, finite number. Got inf."),
        ({"alpha": np.nan}, ValueError, "positive, finite number. Got nan."),
        ({"alpha_pattern": {"a": -2}}, ValueError, "`alpha_pattern`: .*Got -2."),
        ({"dropout": np.nan}, ValueError, r"`dropout` must be in \[0, 1\). Got nan."),
        ({"targets": None}, TypeError, "`targets` must be a regular .* Got None."),
        ({"exclude": ["a", 1]}, TypeError, r"`exclude` must be a .* Got \('a', 1\)."),
        ({"targets": b"a"}, TypeError, "`targets` must be a regular expression"),
        ({"rank_pattern": {1: 2}}, TypeError, "`rank_pattern` must be a regular"),
        ({"rank_pattern": 2}, TypeError, "`rank_pattern` must be a dict of patterns"),
        ({"contract": {"a": "kx"}}, ValueError, "`contract`: the roles .* Got 'kx'"),
        ({"contract": {"a": "nn"}}, ValueError, "at least one k. Got 'nn'"),
        ({"contract": {"a": 0}}, ValueError, "`contract`: contracted axes must be neg"),
        ({"contract": {"a": (-2, -2)}}, ValueError, r"negative integers.*\(-2, -2\)"),
        ({"lora_dtype": "float8_e4m3fn"}, TypeError, "`lora_dtype` must be a floating"),
        ({"fmt": "nf5"}, ValueError, "`fmt` must be one of"),
        ({"block_size": 63}, ValueError, "from 16 to 4096. Got 63."),
        ({"dropout": 1.5}, ValueError, r"`dropout` must be in \[0, 1\). Got 1.5."),
        ({"dropout": 1}, ValueError, r"`dropout` must be in \[0, 1\). Got 1."),
        ({"lora_dtype": "int8"}, TypeError, "`lora_dtype` must be a floating dtype"),
        ({"targets": "("}, ValueError, r"must be a regular expression. Got '\('"),
        ({"fmt": None, "freeze_base": False}, ValueError, "`freeze_base` must be True"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ql.QLoRAConfig(**settings)


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, np.dtype("float32")])
def test_settings_that_say_the_same_are_equal(dtype):
    """Under jit, configs that differ would compile a function twice."""
    config = ql.QLoRAConfig(lora_dtype=dtype)
    assert config.lora_dtype == "float32"
    assert config == ql.QLoRAConfig() and hash(config) == hash(ql.QLoRAConfig())
