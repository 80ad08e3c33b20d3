"""The chunked loss against Optax's loss on the logits of all tokens."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_mesh, normal, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder, head_arguments
from qlora_jax.losses import chunked_cross_entropy


def unchunked_losses(hidden, head, labels, cap=None, dtype=jnp.float32):
    """Returns Optax's loss on the logits of all tokens, for a head `[V, D]`."""
    product = functools.partial(jnp.einsum, "...d,vd->...v")
    logits = product(hidden, head.astype(hidden.dtype), preferred_element_type=dtype)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def problem(seed, lead, width, vocab, dtype=jnp.float32):
    """Returns hidden states, a head `[V, D]`, labels, and cotangents of the losses."""
    hidden = normal(seed, (*lead, width), dtype)
    head = normal(seed + 1, (vocab, width), dtype, scale=2 / np.sqrt(width))
    labels = np.random.default_rng(seed + 2).integers(0, vocab, lead)
    return hidden, head, jnp.asarray(labels, jnp.int32), normal(seed + 3, lead)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pull(function, hidden, g):
    losses, pull = jax.vjp(function, hidden)
    return losses, pull(g.astype(losses.dtype))[0]


@pytest.mark.slow
@given(
    lead=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    width=st.integers(1, 40),
    vocab=st.integers(1, 300),
    chunk_size=st.integers(1, 60),
    contract=st.sampled_from([-1, -2]),
    cap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 100),
)
@settings(max_examples=12)
def test_random_shapes_equal_optax(lead, width, vocab, chunk_size, contract, cap, seed):
    hidden, head, labels, g = problem(seed, lead, width, vocab)
    stored = head if contract == -1 else head.T
    settings = {"contract": contract, "chunk_size": chunk_size, "logit_soft_cap": cap}

    def loss(x):
        return chunked_cross_entropy(x, stored, labels, **settings)

    def exact_losses(x):
        return unchunked_losses(x, head, labels, cap)

    losses, dx = value_and_pull(loss, hidden, g)
    expected, expected_dx = value_and_pull(exact_losses, hidden, g)
    assert_close(losses, expected)
    assert_close(dx, expected_dx)
    # Without a gradient, another program computes the losses.
    assert_close(jax.jit(loss)(hidden), losses, terms=64)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_summed_in_float32(dtype):
    # With 5000 words, most probabilities are below float16's normal numbers.
    hidden, head, labels, g = problem(0, (3, 20), 64, 5000, dtype)

    def loss(x):
        return chunked_cross_entropy(x, head, labels, chunk_size=16)

    losses, dx = value_and_pull(loss, hidden, g)

    def exact_losses(x):
        return unchunked_losses(x, head.astype(jnp.float32), labels)

    expected, expected_dx = value_and_pull(exact_losses, hidden.astype(jnp.float32), g)
    assert losses.dtype == jnp.float32 and dx.dtype == dtype
    assert_close(losses, expected)  # sums of exact products
    assert_close(dx, np.asarray(expected_dx, np.float64), roundings=2)


def test_float32_head_is_cast_to_the_dtype_of_hidden():
    hidden, head, labels, _ = problem(0, (9,), 64, 100, jnp.bfloat16)
    wide = head.astype(jnp.float32) * 1.001
    np.testing.assert_array_equal(
        chunked_cross_entropy(hidden, wide, labels),
        chunked_cross_entropy(hidden, wide.astype(jnp.bfloat16), labels),
    )


@pytest.mark.slow
@pytest.mark.parametrize("contract", [-1, -2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_head_equals_the_dequantized_one(contract, dtype):
    hidden, head, labels, g = problem(0, (5, 9), 128, 100, dtype)
    weight = head if contract == -1 else head.T
    q = ql.quantize(weight, contract=contract)
    w = ql.dequantize(q, dtype)
    w = w if contract == -1 else w.T
    expected, expected_dx = value_and_pull(
        lambda x: unchunked_losses(x, w, labels), hidden, g
    )
    trained = [ql.StraightThrough(weight, q.packing, q.geometry)] * (contract == -2)
    for kernel in [q, *trained]:

        def loss(x, k=kernel):
            return chunked_cross_entropy(x, k, labels, chunk_size=16)

        losses, dx = value_and_pull(loss, hidden, g)
        assert losses.dtype == jnp.float32
        # Logits of a packed head and their gradients are rounded.
        assert_close(losses, expected, dtype=dtype, roundings=2)
        assert_close(dx, expected_dx, dtype=dtype, roundings=2)


def test_labels_outside_the_vocabulary_give_nan_alone():
    hidden, head, labels, _ = problem(0, (3, 5), 8, 40)
    wrong = labels.at[0, 1].set(-100).at[2, 4].set(40).at[1, 0].set(-1)

    def loss(x, y):
        return chunked_cross_entropy(x, head, y, chunk_size=4)

    expected = np.array(loss(hidden, labels))
    expected[[0, 2, 1], [1, 4, 0]] = np.nan
    np.testing.assert_array_equal(jax.jit(loss)(hidden, wrong), expected)
    grad = jax.grad(lambda x: jnp.sum(loss(x, wrong)))(hidden)
    np.testing.assert_array_equal(
        np.isnan(grad), np.repeat(np.isnan(expected)[..., None], 8, axis=-1)
    )


def test_narrow_labels():
    hidden, head, _, _ = problem(0, (2,), 8, 300)
    losses = chunked_cross_entropy(hidden, head, jnp.array([255, 3], jnp.uint8))
    assert_close(losses, unchunked_losses(hidden, head, jnp.array([255, 3])))


def test_large_logits_do_not_overflow():
    hidden, head, labels, _ = problem(0, (6,), 8, 40)
    losses = chunked_cross_entropy(1e4 * hidden, head, labels)
    assert np.isfinite(losses).all() and float(jnp.max(losses)) > 1e3
    assert_close(losses, unchunked_losses(1e4 * hidden, head, labels))


TOKENS, WIDTH, VOCAB, CHUNK = 2048, 64, 4096, 256


def compiled(loss):
    def mean(x, w, y):
        return jnp.mean(loss(x, w, y))

    sizes = (4, TOKENS // 4, WIDTH), (VOCAB, WIDTH), (4, TOKENS // 4)
    shapes = map(jax.ShapeDtypeStruct, sizes, (jnp.float32, jnp.float32, jnp.int32))
    return jax.jit(jax.value_and_grad(mean)).lower(*shapes).compile()


def test_logits_of_all_tokens_are_never_held():
    chunked = compiled(functools.partial(chunked_cross_entropy, chunk_size=CHUNK))
    logits = 4 * TOKENS * VOCAB
    assert compiled(unchunked_losses).memory_analysis().temp_size_in_bytes > logits
    # Memory for a chunk's logits, exponentials and gradient, and some `[tokens, D]`.
    bound = 3 * logits * CHUNK // TOKENS + 4 * 4 * TOKENS * WIDTH
    assert bound < logits / 2
    assert chunked.memory_analysis().temp_size_in_bytes < bound
    # No array in the program has as many elements as all logits.
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", chunked.as_text())
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in shapes]
    assert len(sizes) > 20 and max(sizes) <= CHUNK * VOCAB


@jax.jit
def loss_on_a_mesh(hidden, head, labels, g):
    def loss(x):
        return chunked_cross_entropy(x, head, labels, chunk_size=32)

    return value_and_pull(loss, hidden, g)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, words", [("a", None), (None, "b"), ("a", "b"), ("a", "a")]
)
def test_sharded(mesh, rows, words):
    """A head that is split over words is never gathered; hidden states or sums move."""
    hidden, head, labels, g = problem(0, (8, 12), 16, 64)
    expected = value_and_pull(lambda x: unchunked_losses(x, head, labels), hidden, g)
    hidden, labels, g = spread((hidden, labels, g), mesh, rows)
    args = hidden, spread(head, mesh, words), labels, g
    with jax.set_mesh(mesh):
        result = loss_on_a_mesh(*args)
        text = loss_on_a_mesh.lower(*args).compile().as_text()
    assert_close(result, expected)
    assert result[1].sharding.is_equivalent_to(hidden.sharding, hidden.ndim)
    gathered = re.findall(r"= \S*\[([\d,]+)\]\S* all-gather", text)
    assert bool(gathered) == (rows == words)
    assert not {"64,16", "16,64", "96,16"} & {*gathered}  # the head, all tokens


@pytest.mark.slow
def test_inside_shard_map():
    mesh, axes = make_mesh("Auto"), ("a", "b")
    hidden, head, labels, _ = problem(0, (8, 12), 16, 64)

    def mean(hidden, head, labels):
        losses = chunked_cross_entropy(hidden, head, labels, chunk_size=5)
        return jax.lax.pmean(jnp.mean(losses), axes)

    specs = {"in_specs": (P(axes), P(), P(axes)), "out_specs": P()}
    mean = jax.shard_map(mean, mesh=mesh, **specs)
    result = jax.jit(jax.value_and_grad(mean))(hidden, head, labels)
    exact = jax.value_and_grad(lambda x: jnp.mean(unchunked_losses(x, head, labels)))(
        hidden
    )
    assert_close(result, exact)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"hidden": jnp.ones((2, 8), jnp.int32)}, TypeError, "`hidden` must be float"),
        ({"head": jnp.ones((9, 8), jnp.int32)}, TypeError, "`head` must be floating"),
        ({"labels": jnp.ones(2)}, TypeError, "`labels` must be integer. Got float32"),
        ({"contract": 0}, ValueError, "`contract` must be -1 or -2. Got 0"),
        ({"contract": -2}, ValueError, r"`hidden` must have shape \[\.\.\., 9\]"),
        ({"head": jnp.ones((9, 7))}, ValueError, r"Got \(2, 8\), and a head \(9, 7\)"),
        ({"head": jnp.ones((1, 9, 8))}, ValueError, "`head` must have two axes"),
        ({"labels": jnp.ones(3, jnp.int32)}, ValueError, r"`labels` must .* \(2,\)"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be positive. Got 0"),
        ({"logit_soft_cap": 0.0}, ValueError, "`logit_soft_cap` must be positive"),
        ({"logit_soft_cap": math.inf}, ValueError, "`logit_soft_cap` must be positive"),
    ],
)
def test_refusals(change, error, match):
    arguments = {"hidden": jnp.ones((2, 8)), "head": jnp.ones((9, 8))}
    arguments |= {"labels": jnp.zeros(2, jnp.int32)} | change
    with pytest.raises(error, match=match):
        chunked_cross_entropy(**arguments)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_differentiated_head_is_refused(wrap):
    hidden, head, labels, _ = problem(0, (4, 5), 8, 40)
    loss = wrap(lambda w: jnp.sum(chunked_cross_entropy(hidden, w, labels)))
    with pytest.raises(ValueError, match="`head` must be frozen"):
        jax.grad(lambda w: loss(w) + jnp.sum(w))(head)

    def frozen_loss(w):
        return loss(jax.lax.stop_gradient(w)) + jnp.sum(w)

    np.testing.assert_array_equal(jax.grad(frozen_loss)(head), jnp.ones_like(head))


def small_decoder(tied, **changes):
    changes |= {"num_heads": 4, "num_kv_heads": 2, "tie_embeddings": tied}
    config = DecoderConfig(64, 32, 48, 2, **changes)
    model, tokens = Decoder(config), jnp.arange(10).reshape(2, 5)
    return model, model.init(jax.random.key(0), tokens)["params"], tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    "tied, packed, cap", [(True, False, 0.5), (False, False, None), (False, True, 0.5)]
)
def test_decoder_head(tied, packed, cap):
    model, params, tokens = small_decoder(tied, logit_soft_cap=cap)
    if packed:
        head = ql.quantize(params["lm_head"]["kernel"], block_size=16)
        params = {**params, "lm_head": {"kernel": head}}
        model = ql.linen.wrap(model, scanned=model.scanned)
    logits = model.apply({"params": params}, tokens)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    hidden = model.apply({"params": params}, tokens, return_hidden=True)
    head = head_arguments(model.config, params)
    assert_close(chunked_cross_entropy(hidden, labels=tokens, **head), expected)


@pytest.mark.slow
def test_adapted_head_is_refused_by_name():
    model, params, tokens = small_decoder(False)
    config = ql.QLoRAConfig(rank=2, targets=".*(q_proj|lm_head)/kernel", block_size=16)
    key = jax.random.key(0)
    base, lora = ql.linen.init(key, model, params, config, tokens)
    with pytest.raises(ValueError, match="`lm_head/kernel` must be frozen and without"):
        head_arguments(model.config, base, lora)
    with pytest.raises(ValueError, match="exclude `lm_head` from the targets"):
        head_arguments(model.config, ql.combine(base, lora))
    lora = {"layers": lora["layers"]}
    assert head_arguments(model.config, base, lora)["head"] is base["lm_head"]["kernel"]


def test_losses_of_preferences():
    """Compares with the papers' formulas in float64, also at extreme inputs."""
    rng = np.random.default_rng(0)
    chosen, rejected, nll = -rng.exponential(2, (3, 8))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def odds(x):
        return np.exp(x) / (1 - np.exp(x))

    desirable, kl = rng.random(8) < 0.5, 0.7
    signed = np.where(desirable, chosen - kl, kl - chosen)
    expected = {
        "dpo": -np.log(sigmoid(0.3 * (chosen - rejected))),
        "ipo": (chosen - rejected - 1 / 0.6) ** 2,
        "simpo": -np.log(sigmoid(0.3 * (chosen - rejected) - 0.4)),
        "orpo": nll - 0.3 * np.log(sigmoid(np.log(odds(chosen) / odds(rejected)))),
        "kto": 1 - sigmoid(0.3 * signed),
    }
    options = {"simpo": {"gamma": 0.4}, "orpo": {"nll": jnp.asarray(nll)}}
    pairs = jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)
    for name, right in expected.items():
        two = (pairs[0], desirable, jnp.float32(kl)) if name == "kto" else pairs
        loss = functools.partial(
            getattr(ql.losses, name), beta=0.3, **options.get(name, {})
        )
        assert_close(loss(*two), right)

    # A probability of 1 has infinite odds. A negative kl counts as 0, without gradient.
    def loss_of_odd_rows(x):
        return jnp.sum(ql.losses.orpo(x, pairs[1][:3], jnp.zeros(3)))

    assert np.isfinite(jax.grad(loss_of_odd_rows)(jnp.array([0.0, -1e-9, -1e4]))).all()

    def loss_of_kl(kl):
        return ql.losses.kto(jnp.float32(2), jnp.bool_(True), kl)

    assert loss_of_kl(-3.0) == loss_of_kl(0.0) and jax.grad(loss_of_kl)(1.0) == 0
