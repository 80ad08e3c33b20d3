"""Generation: greedy and sampled, in batches and token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trees_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.data.encode import Example
from qlora_jax.llm.models.config import LayerKind, Rope
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.models.products import einsum_f32
from qlora_jax.llm.models.sampling import Sampling
from qlora_jax.llm.models.stream import Stream
from qlora_jax.llm.train.answers import exact_match, generate_answers

ONE = dict(max_new_tokens=1, eos_ids=())


@pytest.mark.newest
def test_a_stream_in_bfloat16_writes_as_the_plain_decoder(tiny):
    """The definition is a full forward pass in float32 with the rounded weights."""
    model, variables, tokens = tiny
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"])
    settings = {"block_size": 16, "exclude": ".*down_proj.*"}
    base, lora = trees_of(rounded, rank=4, double_quant=True, **settings)
    decoder = Decoder(model.config, dtype=jnp.bfloat16)
    wrapped = ql.linen.wrap(decoder, scanned=decoder.scanned)
    for params, adapter in ((rounded, {}), (base, lora)):
        variables = {"params": params, "lora": adapter}
        stream = Stream(wrapped, variables)
        prompt = tokens[0, :9].tolist()
        new_tokens = list(stream(prompt, max_new_tokens=6, eos_ids=()))
        text = jnp.asarray([prompt + new_tokens])
        logits = jax.jit(wrapped.apply)(variables, text)[0, 8:-1]
        # Sums have another order, so each token is the best one up to their rounding.
        chosen = jnp.take_along_axis(logits, jnp.asarray(new_tokens)[:, None], 1)[:, 0]
        assert np.all(np.asarray(logits.max(1) - chosen) <= 0.02 * np.ptp(logits))


def test_one_row_in_16_bits_is_multiplied_beside_zeros():
    x, w = jnp.ones((1, 1, 64), jnp.bfloat16), jnp.ones((96, 64), jnp.bfloat16)

    def head(x, w):
        return einsum_f32("btd,vd->btv", x, w)

    np.testing.assert_array_equal(head(x, w), np.full((1, 1, 96), 64.0))
    lowered = jax.jit(head).lower(x, w).as_text()
    assert "tensor<1x2x64xbf16>, tensor<96x64xbf16>" in lowered
    grads = jax.grad(lambda *a: head(*a).sum(), (0, 1))(x, w)
    np.testing.assert_array_equal(grads[0], np.full((1, 1, 64), 96.0))
    np.testing.assert_array_equal(grads[1], np.ones((96, 64)))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda *x: generate(*x, [[1], []], **ONE),
            "`prompts` must each have at least",
        ),
        (
            lambda *x: generate(*x, [[1]], sampling=Sampling(1.0), **ONE),
            "`key` must be given",
        ),
        (lambda *x: generate(*x, [], **ONE), "there must be at least one prompt"),
        (
            lambda *x: generate(*x, [[1]], max_new_tokens=0, eos_ids=[]),
            "`max_new_tokens` must be positive",
        ),
        (lambda *x: Stream(*x, Sampling(1.0))([1], **ONE), "`key` must be given"),
        (lambda *x: Stream(*x)([], **ONE), "`prompt` must have at least one token"),
        (lambda *_: Sampling(-1.0), "`temperature` must be at least 0 and finite"),
        (lambda *_: Sampling(np.nan), "`temperature` must be at least 0 and finite"),
        (lambda *_: Sampling(1.0, top_k=0), "`top_k` must be positive or None. Got 0"),
        (lambda *_: Sampling(1.0, top_p=1.5), "`top_p` must be from 0 to 1. Got 1.5"),
        (
            lambda *_: Sampling(top_k=5),
            "`temperature` must be positive with `top_k` or",
        ),
        (lambda *_: Sampling(top_p=0.5), "`temperature` must be positive with `top_k`"),
        (lambda *_: Sampling().filtered(jnp.ones(2)), "must be positive to filter"),
    ],
)
def test_wrong_calls_are_refused(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(*tiny[:2])


# Sampling


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def filtered_probabilities(logits, temperature, top_k, top_p):
    """Follows the definition, one row at a time; all logits of a row differ."""
    rows = []
    for row in logits.astype(np.float64) / temperature:
        order = np.argsort(-row)[: top_k or len(row)]
        probabilities = softmax(row[order])
        # The smallest set of the most probable tokens with a sum of at least `top_p`.
        size = 1 + int(np.sum(np.cumsum(probabilities)[:-1] < top_p))
        filtered = np.zeros(len(row))
        filtered[order[:size]] = probabilities[:size] / probabilities[:size].sum()
        rows.append(filtered)
    return np.array(rows)


DRAWS = [(1.0, None, 1.0), (0.7, None, 1.0), (1.5, 5, 1.0), (1.0, 1, 1.0)]
DRAWS += [(1.0, 1000, 0.5), (0.8, None, 0.9), (1.3, 7, 0.6)]
DRAWS += [(1.0, None, 0.0), (1.0, None, 1e-6)]


@pytest.mark.parametrize("temperature, top_k, top_p", DRAWS)
def test_what_is_drawn_from_is_the_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (6, 40)).astype(np.float32)
    got = Sampling(temperature, top_k, top_p).filtered(jnp.asarray(logits))
    want = filtered_probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isneginf(got), want == 0)
    assert_close(softmax(np.asarray(got)), want)


def test_ties_with_the_last_one_kept_are_kept():
    logits = jnp.array([0.0, 2.0, 1.0, 1.0])

    def is_allowed(**settings):
        return np.isfinite(Sampling(1.0, **settings).filtered(logits))

    assert is_allowed(top_k=2).tolist() == [False, True, True, True]
    # The sorted probabilities are .53, .20, .20 and .07.
    assert is_allowed(top_p=0.6).tolist() == [False, True, True, True]


@pytest.mark.slow
def test_draws_follow_the_probabilities():
    logits = np.random.default_rng(1).normal(0, 1.5, (1, 12)).astype(np.float32)
    sampling, count = Sampling(1.2, 9, 0.9), 20_000
    probabilities = filtered_probabilities(logits, 1.2, 9, 0.9)[0]
    repeated = jnp.broadcast_to(jnp.asarray(logits), (count, 12))
    drawn = np.asarray(sampling.choose(repeated, jax.random.key(0)))
    counts = np.bincount(drawn, minlength=12)
    assert not counts[probabilities == 0].any()
    expected = count * probabilities[probabilities > 0]
    chi_square = np.sum((counts[probabilities > 0] - expected) ** 2 / expected)
    freedom = len(expected) - 1
    assert freedom >= 3 and chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.slow
def test_several_end_tokens_end_rows_of_a_batch(tiny):
    model, variables, tokens = tiny
    prompts = [tokens[0, :9].tolist(), tokens[1, :4].tolist()]

    def generate_rows(ends):
        settings = dict(max_new_tokens=8, eos_ids=ends)
        return generate(model, variables, prompts, **settings)

    free = generate_rows(()).tolist()
    ends = free[0][5], free[1][2]
    for row, stopped in zip(free, generate_rows(ends).tolist(), strict=True):
        first = min(row.index(end) for end in ends if end in row)
        assert stopped == row[: first + 1] + [ends[0]] * (7 - first)


# Token by token


@pytest.mark.slow
def test_a_stream_equals_the_batch_and_continues_a_conversation(tiny):
    model, variables, tokens = tiny
    prompt, key = tokens[0, :7].tolist(), jax.random.key(5)
    sampling, options = Sampling(1.2, 20, 0.9), dict(max_new_tokens=8, eos_ids=())

    def generate_batch(prompt):
        batch = [prompt, tokens[1, :20].tolist()]
        return generate(model, variables, batch, **options)[0].tolist()

    greedy = generate_batch(prompt)
    stream = Stream(model, variables)
    assert list(stream(prompt, **options)) == greedy
    # With several rows, each is drawn with another part of the key's numbers.
    drawn = generate(model, variables, [prompt], sampling=sampling, key=key, **options)
    assert drawn[0].tolist() != greedy
    sampled = Stream(model, variables, sampling)
    assert list(sampled(prompt, **options, key=key)) == drawn[0].tolist()

    # The next prompt continues the last one, shares its beginning, or is different.
    for next_prompt in (prompt + greedy + [3, 4], prompt[:5] + [9] * 3, [8, 1]):
        want = generate_batch(next_prompt)
        assert list(stream(next_prompt, **options)) == want
    end = want[3]
    short = list(stream([8, 1], max_new_tokens=8, eos_ids=(end,)))
    assert short == want[: want.index(end) + 1]


def is_greedy(model, variables, prompt, new_tokens):
    """Whether each new token is the most probable one after the tokens before it."""
    tokens = jnp.array([prompt + new_tokens])
    best = jnp.argmax(jax.jit(model.apply)(variables, tokens)[0], axis=-1)
    return best[len(prompt) - 1 : -1].tolist() == new_tokens


@pytest.mark.slow
def test_a_cache_grows_with_the_text(tiny):
    model, variables, tokens = tiny
    stream, prompt = Stream(model, variables), tokens[0, :9].tolist()
    new = list(stream(prompt, max_new_tokens=260, eos_ids=()))
    assert is_greedy(model, variables, prompt, new)


@pytest.mark.slow
def test_long_rotary_positions_are_those_of_the_texts_length(tiny):
    """Texts of up to 12 tokens have other divisors than longer texts."""
    short, long = (1.0, 1.0, 1.0, 1.0), (9.0, 7.0, 3.0, 2.0)
    model, variables, tokens = tiny
    rope = Rope(1e4, short, long, original_length=12)
    config = dataclasses.replace(model.config, layers=(LayerKind(rope),))
    model = Decoder(config)
    assert config.head_dim == 8
    stream, prompt = Stream(model, variables), tokens[0, :8].tolist()
    for count in (4, 40, 3):
        new = list(stream(prompt, max_new_tokens=count, eos_ids=()))
        plain = dataclasses.replace(rope, divisors=short if count < 5 else long)
        plain = dataclasses.replace(plain, long_divisors=(), original_length=0)
        plain_model = Decoder(dataclasses.replace(config, layers=(LayerKind(plain),)))
        assert is_greedy(plain_model, variables, prompt, new)


@pytest.mark.slow
def test_an_abandoned_answer_does_not_change_the_next(tiny):
    model, variables, tokens = tiny
    prompt = tokens[0, :7].tolist()
    stream = Stream(model, variables)
    want = list(stream(prompt, max_new_tokens=6, eos_ids=()))
    abandoned = stream(tokens[1, :9].tolist(), max_new_tokens=6, eos_ids=())
    for _ in range(2):
        next(abandoned)
    assert list(stream(prompt, max_new_tokens=6, eos_ids=())) == want
    with pytest.raises(RuntimeError, match="not be used after its stream is called"):
        next(abandoned)


# Answers to examples


class Numbers:
    """A tokenizer whose text is the ids."""

    def __init__(self, *end_ids):
        self.end_ids = end_ids

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.slow
def test_answers_are_those_of_each_prompt_alone(tiny):
    model, variables, tokens = tiny
    free = {}
    stream = Stream(model, variables)
    for length in (3, 20, 4, 11, 5):
        prompt = tokens[0, :length].tolist()
        free[length] = prompt, list(stream(prompt, max_new_tokens=6, eos_ids=()))
    end = free[20][1][2]
    prompts, numbers = [prompt for prompt, _ in free.values()], Numbers(end)
    settings = dict(max_new_tokens=6, batch_size=3, progress=False)
    got = generate_answers(model, variables, numbers, prompts, **settings)
    for answer, (_, ids) in zip(got, free.values(), strict=True):
        if end in ids:
            ids = ids[: ids.index(end)]
        assert answer.text == numbers.decode(ids)


def test_exact_match_is_equality_without_the_spaces_around():
    right = ['{"a": 7}', '{"a": 7}', "7\n", "", "x"]
    texts = [' {"a": 7}\n', '{"a":7}', "7", "", "x."]
    examples = [Example([1], answer) for answer in right]
    assert exact_match(texts, examples) == 3 / 5
