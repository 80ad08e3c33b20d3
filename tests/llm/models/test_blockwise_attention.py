"""Attention in blocks against NumPy and JAX's attention, and its memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention, in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

from qlora_jax.llm.models.attention import (
    GPU_BLOCK,
    MANY_QUERIES,
    attend,
    attend_by_matrices,
    with_sinks,
)
from qlora_jax.llm.models.config import DecoderConfig, LayerKind
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.products import keep_products


def draw(b, t, h, k, d, seed=0, dtype=jnp.float32):
    """Returns queries, keys and values, and a causal mask of three segments."""
    rng = np.random.default_rng(seed)
    shapes = (b, t, h, d), (b, t, k, d), (b, t, k, d)
    operands = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
    ids = np.sort(rng.integers(0, 3, (b, t)))
    order = np.arange(t)
    visible = (order[:, None] >= order) & (ids[:, :, None] == ids[:, None, :])
    return *operands, jnp.asarray(visible)


def value_and_pull(function, query, key, value, visible):
    def output_and_gradients(query, key, value):
        y, pull = jax.vjp(lambda *x: function(*x, visible), query, key, value)
        return y, pull(jnp.cos(y))

    return jax.jit(output_and_gradients)(query, key, value)


blocks = partial(attend_by_matrices, scale=0.4, block=16)
plain = partial(attention, scale=0.4, xp=jnp)


@settings(max_examples=6)
@given(
    b=st.integers(1, 2),
    t=st.integers(1, 40),
    k=st.integers(1, 2),
    groups=st.integers(1, 3),
    window=st.integers(1, 40),
    soft_cap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 99),
)
def test_equals_numpy(b, t, k, groups, window, soft_cap, seed):
    query, key, value, visible = draw(b, t, k * groups, k, 8, seed)
    order = np.arange(t)
    visible = np.asarray(visible) & (order[:, None] - order < window)[None]
    operands = query, key, value, jnp.asarray(visible)
    exact = in_float64(*operands, 0.4, soft_cap)
    for run in (partial(attend_by_matrices, block=16), attend):
        ours = jax.jit(partial(run, scale=0.4, soft_cap=soft_cap))(*operands)
        assert_close(ours, exact, terms=64)


def test_a_sink_is_a_score_without_a_value():
    query, key, value, visible = draw(2, 20, 4, 2, 8)
    sinks = jnp.array([-1.0, 0.5, 2.0, 8.0])

    operands = query, key, value, visible

    def plain(sinks):
        return attention(*operands, 0.4, xp=jnp, sinks=sinks)

    def ours(sinks, block):
        operands = with_sinks(query, key, value, visible, sinks / 0.4)
        return attend_by_matrices(*operands, scale=0.4, block=block)[..., :8]

    def value_and_grad(f):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.cos(f(x)))))

    expected = value_and_grad(plain)(sinks)
    for block in (None, 16):
        assert_close(value_and_grad(partial(ours, block=block))(sinks), expected)


def test_keys_of_another_length():
    query, _, _, _ = draw(2, 5, 4, 2, 8)
    _, key, value, _ = draw(2, 37, 4, 2, 8, seed=1)
    visible = jnp.asarray(np.random.default_rng(2).random((2, 5, 37)) < 0.3)
    visible = visible.at[:, :, 30].set(True)
    run = jax.jit(partial(attend_by_matrices, scale=1.0, block=16))
    ours = run(query, key, value, visible)
    exact = in_float64(query, key, value, visible, 1.0)
    assert_close(ours, exact, terms=64)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_gradients_equal_those_of_the_definition(soft_cap):
    operands = draw(2, 50, 6, 2, 8)
    functions = (partial(f, soft_cap=soft_cap) for f in (blocks, plain))
    ours, expected = (value_and_pull(f, *operands) for f in functions)
    for gradient, exact_gradient in zip(
        *map(jax.tree.leaves, (ours, expected)), strict=True
    ):
        assert_close(gradient, exact_gradient, terms=64)


@pytest.mark.without_noise  # which takes memory
def test_many_queries_are_attended_in_blocks():
    """Neither direction holds the scores of all queries and keys."""
    t = 2 * MANY_QUERIES
    operands = draw(1, t, 2, 1, 16)
    function = partial(attend, scale=0.25)
    lowered = jax.jit(partial(value_and_pull, function)).lower(*operands)
    compiled = lowered.compile()
    scores = 2 * t * t * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
    exact = in_float64(*operands, 0.25)
    assert_close(compiled(*operands)[0], exact, terms=t + 16)


@pytest.mark.slow
def test_in_a_scan_with_remat():
    """The policy is that of the decoder, which saves the result for the gradient."""
    query, key, value, visible = draw(1, 40, 4, 2, 8)

    def stack(key, function):
        @partial(jax.checkpoint, policy=keep_products)
        def layer(x, _):
            return x + function(x, key, value, visible), None

        return jnp.sum(jax.lax.scan(layer, query, None, length=3)[0] ** 2)

    grads = [
        jax.jit(jax.grad(stack), static_argnums=1)(key, f) for f in (blocks, plain)
    ]
    assert_close(*grads, terms=64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_rows_split_among_devices(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(getattr(AxisType, kind),))
    operands = draw(2, MANY_QUERIES + 8, 2, 1, 8)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in operands]
        ours = jax.jit(partial(attend, scale=0.4))(*placed)
    assert_close(ours, in_float64(*operands, 0.4), terms=MANY_QUERIES + 16)
    if kind == "Explicit":
        assert jax.typeof(ours).sharding.spec == P("data", None, None, None)


@pytest.mark.slow
def test_vmap():
    operands = [x[None] for x in draw(3, 20, 2, 1, 8)]
    run = partial(attend_by_matrices, scale=0.4, block=8)
    ours = jax.jit(jax.vmap(run, in_axes=1))(*operands)
    exact = in_float64(*(x[0] for x in operands), 0.4)
    assert_close(ours[:, 0], exact, terms=64)


LAYERS = LayerKind(), LayerKind(window=40)
SIZES = dict(num_layers=2, num_heads=4, num_kv_heads=2, layers=LAYERS)


@pytest.mark.parametrize("attention", ["blocks", "cudnn"])
def test_packed_sequences_are_separate(attention, monkeypatch):
    """In cuDNN's place, JAX's plain attention gets its operands: this needs no GPU."""
    config = DecoderConfig(64, 32, 48, **SIZES)
    tokens = jax.random.randint(jax.random.key(0), (1, 150), 0, 64)
    weights = jax.jit(Decoder(config).init)(jax.random.key(1), tokens)
    asked, plain_attention = [], jax.nn.dot_product_attention

    def attention_without_gpu(*operands, implementation=None, **settings):
        asked.append(implementation)
        return plain_attention(*operands, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention_without_gpu)
    ids = jnp.where(jnp.arange(150) < 70, 1, 2)[None]  # a boundary inside a block

    def sum_and_logits(weights, attention, tokens, ids):
        model = Decoder(config, attention=attention)
        logits = model.apply(weights, tokens, segment_ids=ids)
        return jnp.sum(jnp.cos(logits)), logits

    gradient = jax.jit(jax.grad(sum_and_logits, has_aux=True), static_argnums=1)

    def run(attention, tokens, ids=None):
        return gradient(weights, attention, tokens, ids)

    grads, logits = run(attention, tokens, ids)
    assert {*asked} == ({"cudnn"} if attention == "cudnn" else set())
    parts = [run("xla", x) for x in (tokens[:, :70], tokens[:, 70:])]
    assert_close(logits, jnp.concatenate([x for _, x in parts], axis=1), 10_000)
    assert_close(grads, jax.tree.map(jnp.add, *[x for x, _ in parts]), 10_000)
    # The second sequence has the same bits, whatever the first one is.
    _, changed = run(attention, tokens.at[:, :70].set(5), ids)
    np.testing.assert_array_equal(changed[:, 70:], logits[:, 70:])


def test_blocks_on_gpus_are_larger_and_form_no_scores():
    shapes = [jax.ShapeDtypeStruct((1, 512, n, 8), jnp.float16) for n in (4, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((1, 512, 512), bool))
    attend_blocks = partial(attend, scale=1.0, implementation="blocks")
    traced = jax.jit(attend_blocks).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<2x2x{GPU_BLOCK}x{GPU_BLOCK}xf32>" in text
    assert "512x512xf" not in text


def test_cudnn_is_refused_for_models_that_it_does_not_support():
    for option in (dict(attention_soft_cap=2.0), dict(sinks=True)):
        config = DecoderConfig(64, 32, 48, **SIZES, **option)
        with pytest.raises(ValueError, match="must not be cudnn for a model with a"):
            Decoder(config, attention="cudnn")
