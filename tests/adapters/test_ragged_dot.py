"""Adapters of experts, against `lax.ragged_dot` of merged weights by the formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fast_and_slow, normal, randomized
from tolerances import assert_close

import qlora_jax as ql

ROWS, EXPERTS, K, N, RANK = 40, 5, 128, 24, 4
SIZES = jnp.array([8, 0, 13, 1, 16])
KERNEL = jnp.asarray(normal(0, (EXPERTS, K, N)))
CONFIG = ql.QLoRAConfig(rank=RANK, alpha=8)


def trees(config=CONFIG):
    base, lora = ql.init(jax.random.key(0), {"kernel": KERNEL}, config)
    return base["kernel"], randomized(lora["kernel"])


def merged(w, lora):
    """`W + s A B` of each expert."""
    return w + lora.scaling * jnp.einsum("ekr,ern->ekn", lora.a, lora.b)


def loss(product, x, *args):
    return jnp.sum(jnp.square(product(x, *args).astype(jnp.float32)))


@pytest.mark.parametrize("dtype", fast_and_slow(["float32"], ["bfloat16"]))
def test_product_and_gradients(dtype):
    q, lora = trees()
    x = normal(1, (ROWS, K), dtype, scale=0.1)

    def ours(x, lora):
        return ql.ragged_dot(x, q, SIZES, lora)

    def reference(x, lora):
        w = merged(ql.dequantize(q), lora)
        return jax.lax.ragged_dot(x.astype(jnp.float32), w, SIZES)

    for run in (lambda f: f, lambda f: jax.grad(functools.partial(loss, f), (0, 1))):
        got, want = run(ours)(x, lora), run(reference)(x, lora)
        # The products with W, A and B are rounded, and so is their sum.
        assert_close(got, want, dtype=dtype, roundings=4)
    assert ours(x, lora).dtype == x.dtype
    combined = ql.combine({"kernel": q}, {"kernel": lora})["kernel"]
    np.testing.assert_array_equal(ql.ragged_dot(x, combined, SIZES), ours(x, lora))
    weights = merged(ql.dequantize(q), lora)
    assert_close(ql.merge(q, lora), weights, terms=64)
    if dtype == "float32":  # each expert with rows of its own
        x = normal(2, (EXPERTS, 3, K))
        products = jnp.einsum("emk,ekn->emn", x, weights)
        assert_close(ql.apply(q, lora, x), products)


@pytest.mark.newest
@pytest.mark.parametrize(
    "mapped, config",
    [(name, CONFIG) for name in ("x", "lora", "sizes")],
)
def test_vmap(mapped, config):
    q, lora = trees(config)
    x = normal(1, (3, ROWS, K))
    sizes = jnp.stack([SIZES, SIZES[::-1], 0 * SIZES])
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), lora)
    operands = {"x": x[0], "lora": lora, "sizes": SIZES}
    operands |= {mapped: {"x": x, "lora": members, "sizes": sizes}[mapped]}
    axes = [0 if name == mapped else None for name in operands]

    def member_of(name, i):
        return jax.tree.map(lambda a: a[i], operands[name])

    def run(product, x, lora, sizes):
        return jax.grad(lambda *args: loss(product, *args, sizes), (0, 1))(x, lora)

    def ours(x, lora, sizes):
        return ql.ragged_dot(x, q, sizes, lora)

    got = jax.jit(jax.vmap(functools.partial(run, ours), axes))(*operands.values())
    w = ql.dequantize(q)

    def reference(x, lora, sizes):
        return jax.lax.ragged_dot(x, merged(w, lora), sizes)

    for i in range(3):
        member_operands = (
            member_of(name, i) if name == mapped else operands[name]
            for name in operands
        )
        want = run(reference, *member_operands)
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert_close(a[i], b)


def test_layer_of_a_stack():
    stack, lora = trees(), trees()[1]
    q = jax.tree.map(lambda a: jnp.stack([0 * a, a]), stack[0])
    x = normal(1, (ROWS, K))

    def layer(i):
        return ql.ragged_dot(x, q, SIZES, lora, layer=i)

    expected = ql.ragged_dot(x, stack[0], SIZES, lora)
    assert_close(jax.jit(layer)(1), expected, terms=64)


def test_experts_that_are_trained_through_their_quantization():
    kernel, lora = trees(dataclasses.replace(CONFIG, freeze_base=False))
    x = normal(1, (ROWS, K))

    def ours(x, kernel, lora):
        return ql.ragged_dot(x, kernel, SIZES, lora)

    got = jax.grad(functools.partial(loss, ours), 1)(x, kernel, lora)
    w = kernel.dequantize()

    def reference(x, w):
        return jax.lax.ragged_dot(x, merged(w, lora), SIZES)

    # The gradient is taken at the quantized weights (straight-through, Bengio 2013).
    want = jax.grad(functools.partial(loss, reference), 1)(x, w)
    assert_close(got.value, want)


def test_dropout_acts_on_the_input_of_the_adapter():
    q, lora = trees(dataclasses.replace(CONFIG, dropout=0.5))
    x = normal(1, (ROWS, K))
    frozen = ql.ragged_dot(x, q, SIZES)
    key = jax.random.key(3)

    def product(x, key):
        return ql.ragged_dot(x, q, SIZES, lora, dropout_key=key)

    keep = jax.random.bernoulli(key, 0.5, x.shape)
    want = frozen + product(2 * x * keep, None) - ql.ragged_dot(2 * x * keep, q, SIZES)
    assert_close(product(x, key), want)


def test_gradients_keep_codes_and_no_weights():
    experts, width = 16, 256
    q = ql.quantize(normal(0, (experts, width, width)))
    config = ql.QLoRAConfig(rank=RANK)
    lora = ql.init(jax.random.key(0), {"kernel": q}, config)[1]["kernel"]
    x, sizes = normal(1, (64, width)), jnp.full(experts, 4)

    def run(x, q, lora, sizes):
        return jax.grad(lambda x, lora: loss(ql.ragged_dot, x, q, sizes, lora), (0, 1))(
            x, lora
        )

    compiled = jax.jit(run).lower(x, q, lora, sizes).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < 4 * (2 * width * width + 3 * lora.size) < 4 * q.size / 4


def test_adapters_of_other_kinds_and_shapes_are_refused():
    q, lora = trees()
    x = jnp.ones((ROWS, K))
    dora = trees(dataclasses.replace(CONFIG, use_dora=True))[1]
    with pytest.raises(NotImplementedError, match="a ragged product supports LoRA"):
        ql.ragged_dot(x, q, SIZES, dora)
    in_full = ql.QLoRAConfig(targets=(), trainable="kernel")
    trained = ql.init(jax.random.key(0), {"kernel": KERNEL}, in_full)[1]["kernel"]
    with pytest.raises(NotImplementedError, match="none from a bank. Got Trained."):
        ql.ragged_dot(x, KERNEL, SIZES, trained)
    with pytest.raises(TypeError, match=r"Got 2 kernels in \['int4', 'nf4'\]"):
        ql.ragged_dot(x, [ql.quantize(KERNEL[0], fmt) for fmt in ("nf4", "int4")], [1])
    single_adapter = jax.tree.map(lambda a: a[:1], lora)
    with pytest.raises(ValueError, match="`lora` must be the adapter of the experts"):
        ql.ragged_dot(x, q, SIZES, single_adapter)
