"""One contract for both Flax integrations: what a wrapped model computes.

The contract covers pairs of models (integration_pairs.py), one in linen and one in NNX,
which the tests see as pure functions (integration_helpers.py). It continues in
`test_integration_settings.py` and `test_integration_transforms.py`. Features of only
one integration (lifted transforms and collections of linen, variables and graphs of
NNX) are tested in other files.
"""

import dataclasses
import pickle
from copy import deepcopy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantize, fast_and_slow, randomized
from integration_helpers import CONFIG, INTEGRATIONS, build, make_x, value_and_gradients
from integration_pairs import PAIRS
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.parametrize(
    "flax", INTEGRATIONS.values(), ids=list(INTEGRATIONS)
)


# What a wrapped model computes

FAST = ["own", "two kernels"]
SLOW = [name for name in PAIRS if name not in FAST]


@pytest.mark.parametrize("name", fast_and_slow(FAST, SLOW))
def test_values_and_gradients_are_those_of_the_merged_model(flax, name):
    wrapped, lora, x = build(flax, name)
    packed, merged = wrapped.check(lora, x)
    # B = 0, so the adapters add nothing.
    assert_close(packed(wrapped.lora, x)[1], merged(wrapped.lora, x)[1])


@pytest.mark.parametrize(
    "name", fast_and_slow(["own"], ["dense", "general out", "einsum", "mlp stack"])
)
def test_eager_is_jitted(flax, name):
    wrapped, lora, x = build(flax, name)
    want = jax.jit(wrapped.apply)(lora, wrapped.base, x)
    assert_close(wrapped.apply(lora, wrapped.base, x), want)
    if name in ("own", "dense"):

        def loss(lora):
            return jnp.sum(jnp.square(wrapped.apply(lora, wrapped.base, x)))

        grads = jax.grad(loss)(lora)
        with jax.disable_jit():
            assert_close(wrapped.apply(lora, wrapped.base, x), want)
            assert_close(jax.grad(loss)(lora), grads)


@pytest.mark.parametrize("name", fast_and_slow(FAST, SLOW))
def test_merged_kernels_are_the_sum_in_numpy(flax, name):
    """NumPy decodes the stored format and computes `W + scaling * A B`."""
    wrapped, lora, _ = build(flax, name)
    base, adapters = wrapped.trees(lora, wrapped.base)
    merged = leaves_by_path(wrapped.merge(lora, wrapped.base))
    adapters = leaves_by_path(adapters)
    for path, q in leaves_by_path(base).items():
        if path not in PAIRS[name].matrices:
            np.testing.assert_array_equal(merged[path], q)
            continue
        a, b = (np.asarray(factor) for factor in (adapters[path].a, adapters[path].b))
        want = dequantize(q) + 8 / 4 * (a @ b)
        assert_close(np.asarray(q.geometry.to_matrix(merged[path])), want, terms=64)


@pytest.mark.parametrize("name", fast_and_slow(["mlp"], ["attention stack"]))
def test_leaves_that_are_trained_in_full_replace_those_of_the_base(flax, name):
    """Biases, norms, and a kernel, which is then not a target."""
    patterns = [".*bias", *[".*scale", ".*/out/kernel"] * (name != "mlp")]
    config = dataclasses.replace(CONFIG, trainable=patterns)
    wrapped, _, x = build(flax, name, config)
    lora = randomized(wrapped.lora, seed=50)
    wrapped.check(lora, x)
    base, adapters = map(leaves_by_path, wrapped.trees(lora, wrapped.base))
    start = leaves_by_path(wrapped.trees(wrapped.lora, wrapped.base)[1])
    plain = leaves_by_path(wrapped.merge(lora, wrapped.base))
    trained = {path for path, x in adapters.items() if isinstance(x, ql.Trained)}
    assert trained == {path for path in base if config.is_trained(path)}
    for path in trained:
        np.testing.assert_array_equal(start[path].value, base[path])
        np.testing.assert_array_equal(plain[path], adapters[path].value)
        assert not np.array_equal(plain[path], base[path])


def test_rows_of_a_table_are_trained_alone(flax):
    """The table stays frozen; a LoRA would need an entry of A for each row."""
    path, rows = "embed/embedding", [47, 0, 3]
    config = ql.QLoRAConfig(targets=(), trainable_rows={path: rows})
    wrapped, _, x = build(flax, "embedding", config)
    lora = randomized(wrapped.lora, seed=50)
    wrapped.check(lora, x)
    base, adapters = map(leaves_by_path, wrapped.trees(lora, wrapped.base))
    start = leaves_by_path(wrapped.trees(wrapped.lora, wrapped.base)[1])
    merged = np.asarray(leaves_by_path(wrapped.merge(lora, wrapped.base))[path])
    np.testing.assert_array_equal(start[path].rows, base[path][jnp.array([0, 3, 47])])
    want = np.array(base[path])
    want[[0, 3, 47]] = adapters[path].rows
    np.testing.assert_array_equal(merged, want)


@pytest.mark.parametrize("name", fast_and_slow(["mlp"], ["own", "mlp stack"]))
@pytest.mark.parametrize("copy", [lambda x: pickle.loads(pickle.dumps(x)), deepcopy])
def test_pickles_and_copies_compute_the_same(flax, name, copy):
    wrapped, lora, x = build(flax, name)
    again = wrapped.copied(copy)
    assert jax.tree.structure(again.base) == jax.tree.structure(wrapped.base)
    got, want = (w.apply(lora, w.base, x) for w in (again, wrapped))
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_targets_are_packed_along_what_is_contracted_and_keep_their_shape(flax, name):
    """qwix 0.1.8 gives the 2,048 weights of an out-projection one scale."""
    pair = PAIRS[name]
    wrapped, _, _ = build(flax, name)
    base, lora = map(leaves_by_path, wrapped.trees(wrapped.lora, wrapped.base))
    plain = leaves_by_path(wrapped.merge(wrapped.lora, wrapped.base))
    packed = {path: q for path, q in base.items() if isinstance(q, ql.QTensor)}
    assert set(packed) == set(lora) == set(pair.matrices)
    for path, (*batch, k, n) in pair.matrices.items():
        q, adapter = packed[path], lora[path]
        assert (q.shape, q.dtype) == (plain[path].shape, jnp.float32)
        assert (q.fmt, q.block_size, q.double_quant) == ("nf4", 16, True)
        assert q.scales.shape == (*batch, -(-k // 16), n)
        assert adapter.a.shape == (*batch, k, 4)
        assert adapter.b.shape == (*batch, 4, n)
        assert not np.any(adapter.b) and adapter.scaling == 2
    factors = [np.asarray(adapter.a) for adapter in lora.values()]
    # No two adapters or layers start with the same factors.
    for i, factor in enumerate(factors):
        rows = factor if factor.ndim == 3 else [factor]
        other_factors = [*rows[1:], *factors[i + 1 :]]
        assert not any(np.array_equal(rows[0], factor_b) for factor_b in other_factors)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "two kernels", "mlp stack"])
@pytest.mark.parametrize("transform", ["jit", "eval_shape"])
def test_wrapping_under_a_trace_keeps_every_adapter(flax, name, transform):
    """qwix 0.1.8 silently loses those of attention and of one of two kernels."""
    pair = PAIRS[name]
    x = make_x(pair)

    def create():
        wrapped = flax.wrap(flax.make(pair), CONFIG, x)
        return wrapped.lora, wrapped.base

    got = jax.jit(create)() if transform == "jit" else jax.eval_shape(create)
    wrapped, _, _ = build(flax, name)
    want = wrapped.lora, wrapped.base
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    if transform == "jit":
        assert_close(got[0], want[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    # A layer rounds its product, the two products of its adapter and their sum, and the
    # backward pass as often. Attention is two layers in a row, and more in between.
    "name, roundings",
    [("einsum", 8), ("mlp", 16), ("attention", 24)],
)
def test_in_bfloat16_it_is_near_the_merged_model_in_float32(flax, name, roundings):
    pair = PAIRS[name]
    x = make_x(pair, jnp.bfloat16)
    low = flax.wrap(flax.make(pair, dtype=jnp.bfloat16), CONFIG, x)
    high = flax.wrap(flax.make(pair, dtype=jnp.float32), CONFIG, x)
    lora = randomized(low.lora)
    (g_lora, g_x, _), y = value_and_gradients(low.apply, low.base)(lora, x)
    high_x = x.astype(jnp.float32)
    (w_lora, w_x, _), w_y = value_and_gradients(high.merged, high.base)(lora, high_x)
    assert y.dtype == g_x.dtype == jnp.bfloat16

    def to_float32(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32), tree)

    want = w_lora, w_x, w_y
    got = to_float32((g_lora, g_x, y))
    assert_close(got, want, dtype=jnp.bfloat16, roundings=roundings)


DENSE = ["dense", "general"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSE, "einsum"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes_of_the_module_are_respected(flax, name, dtype, param_dtype):
    dtype, param_dtype = dtype and jnp.dtype(dtype), jnp.dtype(param_dtype)
    x = make_x(PAIRS[name])
    model = flax.make(PAIRS[name], dtype=dtype, param_dtype=param_dtype)
    wrapped = flax.wrap(model, CONFIG, x)
    base, lora = wrapped.trees(wrapped.lora, wrapped.base)
    assert base["kernel"].dtype == base["bias"].dtype == param_dtype
    assert lora["kernel"].a.dtype == lora["kernel"].b.dtype == jnp.float32
    inputs = [x, x.astype(jnp.bfloat16)]
    for x in inputs:

        def run(apply, x=x):
            return jax.jit(apply)(wrapped.lora, wrapped.base, x)

        got, want = run(wrapped.apply), run(wrapped.merged)
        assert got.dtype == want.dtype
        # What rounds to 16 bits: products with W (in both), A and B, and the sum.
        assert_close(got, want, roundings=5)


@pytest.mark.parametrize("name", fast_and_slow(["einsum"], DENSE))
def test_precision_of_the_module_reaches_every_product(flax, name):
    pair = PAIRS[name]
    x = make_x(pair)
    model = flax.make(pair, precision=jax.lax.Precision.HIGHEST)
    wrapped = flax.wrap(model, CONFIG, x)
    jaxpr = jax.make_jaxpr(wrapped.apply)(wrapped.lora, wrapped.base, x)
    products = str(jaxpr).split("dot_general[")[1:]
    assert len(products) >= 3  # W, A and B
    assert all("precision=(Precision.HIGHEST" in text[:400] for text in products)


@pytest.mark.slow
def test_sums_are_kept_in_the_element_type_that_is_preferred(flax):
    """bfloat16 operands give a float32 result without a rounding in between."""
    pair = PAIRS["einsum"]
    x = make_x(pair)
    model = flax.make(pair, dtype=jnp.bfloat16, preferred_element_type=jnp.float32)
    wrapped = flax.wrap(model, CONFIG, x)
    lora = randomized(wrapped.lora)
    got, want = (run(lora, wrapped.base, x) for run in (wrapped.apply, wrapped.merged))
    assert got.dtype == jnp.float32
    assert_close(got, want)
