"""The gated delta rule against its recurrence, and in decoding and packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from qlora_jax.llm.models.config import DecoderConfig, DeltaRule, LayerKind
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.delta_rule import gated_delta_rule
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.models.stream import Stream
from qlora_jax.llm.models.tiny import random_params

LINEAR = LayerKind(None, delta_rule=DeltaRule(2, 4, key_dim=8, value_dim=6))
CONFIG = DecoderConfig(
    *(64, 32, 48, 3, 4, 2), layers=(LINEAR, LINEAR, LayerKind()), attention_gate=True
)


def random_operands(length):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 2, length, 2, 8))
    value = rng.normal(size=(2, length, 4, 6))
    # Some heads forget the state within a token, and others hardly forget.
    rates = np.exp(np.linspace(-4, 2.8, 4))
    log_decay = -rates * rng.uniform(size=(2, length, 4))
    return query, key, value, log_decay, rng.uniform(size=(2, length, 4))


def recur(query, key, value, log_decay, strength, starts):
    """Computes the rule token by token in float64; `starts` are those of sequences."""

    def prepare(x):
        x = x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)
        return np.repeat(x, 2, axis=2)

    query, key = prepare(query) / np.sqrt(query.shape[-1]), prepare(key)
    state, outputs = np.zeros((2, 4, 8, 6)), []
    for t in range(query.shape[1]):
        if t in starts:
            state = np.zeros_like(state)
        state = state * np.exp(log_decay[:, t])[..., None, None]
        stored = np.einsum("bhkv,bhk->bhv", state, key[:, t])
        written = (value[:, t] - stored) * strength[:, t][..., None]
        state = state + key[:, t][..., None] * written[:, :, None]
        outputs.append(np.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return np.stack(outputs, axis=1), state


def test_chunks_compute_the_recurrence():
    operands, starts = random_operands(150), (5, 67, 128)
    expected = recur(*operands, starts)
    ids = np.cumsum(np.isin(np.arange(150), starts))[None].repeat(2, axis=0)
    operands = [jnp.asarray(x, jnp.float32) for x in operands]
    assert_close(jax.jit(gated_delta_rule)(*operands, jnp.asarray(ids)), expected)


def test_the_backward_pass_keeps_no_matrices_of_chunks():
    """Its memory grows with the operands and the states at the start of each chunk."""

    def mean(operands):
        return gated_delta_rule(*operands)[0].mean()

    def temporaries(length):
        shapes = [
            jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in random_operands(length)
        ]
        compiled = jax.jit(jax.grad(mean)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    num_chunks, rows, heads, tokens, key_dim, value_dim = 8, 2, 4, 64, 8, 6
    states = num_chunks * rows * heads * key_dim * value_dim
    matrices = num_chunks * rows * heads * tokens * tokens
    vectors = num_chunks * rows * heads * tokens * (2 * key_dim + value_dim)
    grown = temporaries(16 * tokens) - temporaries(8 * tokens)
    # The operands of all chunks are copied, and so are their gradients. Without
    # recomputation, more than ten matrices of each chunk are kept.
    assert 4 * (states + vectors) < grown < 4 * (states + 8 * vectors + matrices)


def test_calls_continue_the_recurrence():
    operands = random_operands(80)
    expected, last_state = recur(*operands, starts=())
    operands = [jnp.asarray(x, jnp.float32) for x in operands]
    outputs, state = [], None
    for start, end in ((0, 70), (70, 71), (71, 80)):
        part = [x[:, start:end] for x in operands]
        output, state = jax.jit(gated_delta_rule)(*part, state=state)
        outputs.append(output)
    assert_close(jnp.concatenate(outputs, axis=1), expected)
    assert_close(state, last_state)


@pytest.fixture(scope="module")
def decoder():
    model, variables = Decoder(CONFIG), {"params": random_params(CONFIG)}

    @jax.jit
    def choose(tokens, length):
        logits = model.apply(variables, tokens)
        return jnp.argmax(logits[0, length - 1])

    def continue_greedily(prompt, count):
        """Computes the logits of the whole sequence for each new token."""
        tokens = np.zeros((1, 24), np.int32)
        for length in range(len(prompt), len(prompt) + count):
            tokens[0, : len(prompt)] = prompt
            prompt = [*prompt, int(choose(tokens, length))]
            tokens[0, length] = prompt[-1]
        return prompt[-count:]

    return model, variables, continue_greedily


def test_padded_prompts_are_continued_like_whole_sequences(decoder):
    model, variables, continue_greedily = decoder
    prompts = [[*range(3, 12)], [5, 7]]
    answers = generate(model, variables, prompts, max_new_tokens=5, eos_ids=[])
    assert answers.tolist() == [continue_greedily(x, 5) for x in prompts]


def test_a_stream_starts_again_if_a_prompt_differs(decoder):
    model, variables, continue_greedily = decoder
    stream, first = Stream(model, variables), [3, 4, 5, 6, 7]
    # The second prompt continues the first one; the third one changes a token.
    second = [*first, *continue_greedily(first, 3), 9]
    for prompt in (first, second, [*second[:6], 11]):
        answer = [*stream(prompt, max_new_tokens=3, eos_ids=[])]
        assert answer == continue_greedily(prompt, 3)


def test_rows_out_of_order_become_nan(decoder):
    model, variables, _ = decoder
    positions = jnp.array([[0, 1, 2], [0, 2, 1]])
    logits = model.apply(variables, positions, positions=positions)
    assert jnp.isnan(logits).any(axis=(1, 2)).tolist() == [False, True]
