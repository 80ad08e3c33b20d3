"""The chunked divergence from a teacher against NumPy's formula on all logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, spread
from test_losses import value_and_pull
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.losses import chunked_kl_divergence


def problem(seed, lead, width, teacher_width, vocab, dtype=jnp.float32):
    """Returns hidden states and heads `[V, D]` of both models, and cotangents."""
    arrays = []
    for index, size in enumerate((width, teacher_width)):
        arrays.append(normal(seed + index, (*lead, size), dtype))
        arrays.append(normal(seed + index + 2, (vocab, size), dtype, 2 / np.sqrt(size)))
    return *arrays, normal(seed + 4, lead)


def oracle(arrays, temperature, caps=(None, None)):
    """Returns the divergences, gradients, and magnitudes of the divergences."""
    *arrays, g = (np.asarray(x, np.float64) for x in arrays)
    log_probs, slopes = [], []
    for hidden, head, cap in zip(arrays[::2], arrays[1::2], caps, strict=True):
        logits = hidden @ head.T
        capped = logits if cap is None else cap * np.tanh(logits / cap)
        slopes.append(1 if cap is None else 1 - (capped / cap) ** 2)
        scaled = capped / temperature
        shifted = scaled - scaled.max(-1, keepdims=True)
        log_probs.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    log_q, log_p = log_probs
    terms = temperature**2 * np.exp(log_p) * np.stack([log_p, log_q])
    losses = (terms[0] - terms[1]).sum(-1)
    dlogits = temperature * (np.exp(log_q) - np.exp(log_p)) * slopes[0]
    return losses, (dlogits * g[..., None]) @ arrays[1], np.abs(terms).sum((0, -1))


@pytest.mark.parametrize(
    "lead, chunk_size, temperature, caps, contract",
    [
        ((3, 5), 4, 1.0, (None, None), -1),
        ((7,), 7, 2.5, (1.5, None), -2),
        ((2, 3), 60, 0.5, (None, 2.0), -1),
    ],
)
def test_equals_numpy(lead, chunk_size, temperature, caps, contract):
    hidden, head, *teacher, g = arrays = problem(0, lead, 12, 20, 90)

    def loss(hidden, teacher_hidden):
        heads = head if contract == -1 else head.T, teacher[1]
        return chunked_kl_divergence(
            hidden,
            heads[0],
            teacher_hidden,
            heads[1],
            temperature=temperature,
            contract=contract,
            chunk_size=chunk_size,
            logit_soft_cap=caps[0],
            teacher_logit_soft_cap=caps[1],
        )

    losses, dx = value_and_pull(lambda x: loss(x, teacher[0]), hidden, g)
    expected, expected_dx, magnitude = oracle(arrays, temperature, caps)
    assert_close(losses, expected, magnitude=magnitude)
    assert_close(dx, expected_dx)
    # Without a gradient, another program computes the losses.
    assert_close(jax.jit(loss)(hidden, teacher[0]), losses, magnitude=magnitude)
    # The teacher is frozen.
    grad = jax.grad(lambda x: jnp.sum(loss(hidden, x)))(teacher[0])
    np.testing.assert_array_equal(grad, 0)


def test_16_bits_are_summed_in_float32():
    arrays = problem(0, (3, 20), 64, 32, 5000, jnp.bfloat16)

    def loss(hidden):
        return chunked_kl_divergence(hidden, *arrays[1:-1], chunk_size=16)

    losses, dx = value_and_pull(loss, arrays[0], arrays[-1])
    expected, expected_dx, magnitude = oracle(arrays, 1.0)
    assert losses.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    assert_close(losses, expected, magnitude=magnitude)
    assert_close(dx, expected_dx, roundings=2)


def test_packed_heads_equal_the_dequantized_ones():
    hidden, head, teacher_hidden, teacher_head, g = problem(0, (5, 9), 64, 128, 100)
    packed = ql.quantize(head.T), ql.quantize(teacher_head.T)
    weights = [ql.dequantize(q).T for q in packed]

    def loss(hidden):
        return chunked_kl_divergence(
            hidden, packed[0], teacher_hidden, packed[1], chunk_size=16
        )

    arrays = hidden, weights[0], teacher_hidden, weights[1], g
    expected, expected_dx, magnitude = oracle(arrays, 1.0)
    losses, dx = value_and_pull(loss, hidden, g)
    assert_close(losses, expected, magnitude=magnitude)
    assert_close(dx, expected_dx)


def test_is_zero_for_equal_models_and_finite_for_large_logits():
    hidden, head, *teacher, _ = problem(0, (6,), 8, 8, 40)
    same = chunked_kl_divergence(hidden, head, hidden, head, temperature=0.7)
    # A sum of 40 terms that cancel, of which none is larger than the entropy.
    assert_close(same, jnp.zeros(6), magnitude=jnp.full(6, jnp.log(40.0)))
    far = chunked_kl_divergence(1e4 * hidden, head, *teacher)
    assert np.isfinite(far).all() and float(jnp.max(far)) > 1e3


def test_logits_of_all_tokens_are_never_held():
    tokens, width, vocab, chunk = 2048, 64, 4096, 256

    def mean(*arrays):
        return jnp.mean(chunked_kl_divergence(*arrays, chunk_size=chunk))

    sizes = [(tokens, width), (vocab, width)] * 2
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    compiled = jax.jit(jax.value_and_grad(mean)).lower(*shapes).compile()
    logits = 4 * tokens * vocab
    # Memory for a chunk's logits, probabilities and gradient of both models.
    bound = 6 * logits * chunk // tokens + 8 * 4 * tokens * width
    assert compiled.memory_analysis().temp_size_in_bytes < bound < logits
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in shapes]
    assert len(sizes) > 20 and max(sizes) <= chunk * vocab


@pytest.mark.slow
@pytest.mark.parametrize("rows, words", [("a", None), ("a", "b")])
def test_sharded(mesh, rows, words):
    arrays = problem(0, (8, 12), 16, 24, 64)
    expected, expected_dx, magnitude = oracle(arrays, 2.0)

    @jax.jit
    def run(hidden, head, teacher_hidden, teacher_head, g):
        teacher = teacher_hidden, teacher_head
        settings = {"chunk_size": 32, "temperature": 2.0}
        return value_and_pull(
            lambda x: chunked_kl_divergence(x, head, *teacher, **settings), hidden, g
        )

    hidden, head, teacher_hidden, teacher_head, g = arrays
    hidden, teacher_hidden, g = spread((hidden, teacher_hidden, g), mesh, rows)
    head, teacher_head = spread((head, teacher_head), mesh, words)
    with jax.set_mesh(mesh):
        losses, dx = run(hidden, head, teacher_hidden, teacher_head, g)
    assert_close(losses, expected, magnitude=magnitude)
    assert_close(dx, expected_dx)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"head": jnp.ones((9, 7))}, ValueError, r"^`hidden` must have .*\(9, 7\)"),
        ({"teacher_head": jnp.ones((9, 7))}, ValueError, "`teacher_hidden` must have"),
        (
            {"teacher_head": jnp.ones((8, 5))},
            ValueError,
            "vocabulary of `head`, 9. Got",
        ),
        ({"teacher_hidden": jnp.ones((3, 5))}, ValueError, "one row for each token"),
        ({"teacher_hidden": jnp.ones((2, 5), int)}, TypeError, "`teacher_hidden` must"),
        ({"teacher_contract": 0}, ValueError, "`teacher_contract` must be -1 or -2"),
        ({"teacher_logit_soft_cap": -1}, ValueError, "`teacher_logit_soft_cap` must"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be positive and finite"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` must be positive. Got 0"),
    ],
)
def test_refusals(change, error, match):
    arguments = {"hidden": jnp.ones((2, 8)), "head": jnp.ones((9, 8))}
    arguments |= {"teacher_hidden": jnp.ones((2, 5)), "teacher_head": jnp.ones((9, 5))}
    with pytest.raises(error, match=match):
        chunked_kl_divergence(**(arguments | change))


def test_differentiated_head_is_refused():
    hidden, head, *teacher, _ = problem(0, (4,), 8, 8, 40)
    loss = functools.partial(chunked_kl_divergence, hidden)
    with pytest.raises(ValueError, match="`head` must be frozen"):
        jax.grad(lambda w: jnp.sum(loss(w, *teacher)))(head)
