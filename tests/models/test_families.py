"""The decoder's parts, and how the families' configs are read; see also interop/."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal_but_for_rounding

import qlora_jax as ql
from qlora_jax.models.attention import attend, attend_by_matrices
from qlora_jax.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.models.decoder import Decoder, init_cache
from qlora_jax.models.decoder_names import decoder_names
from qlora_jax.models.families import FAMILIES, config_from_hf

LONG = Rope(1e4, (1.0, 1.5, 2.0), (3.0, 4.0, 5.0), original_length=9, scale=1.2)
MIXED = DecoderConfig(
    48,
    16,
    24,
    4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(
        LayerKind(Rope(1e2), 5),
        LayerKind(None),
        LayerKind(LONG, 3),
        LayerKind(Rope(1e2)),
    ),
    rotary_dim=6,
    unit_offset_norms=True,
    post_norms=True,
    qk_norms=True,
    activation="gelu_pytorch_tanh",
    fused=True,
    embedding_scale=4.0,
    attention_soft_cap=5.0,
    logit_soft_cap=30.0,
)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def mixed():
    model = Decoder(MIXED)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 48)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x + 0.1, params)
    return model, params, tokens


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_equals_its_formula(soft_cap):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 6, h, 8)) for h in (4, 2, 2))
    visible = np.tril(np.ones((6, 6), bool))[None] & (rng.random((2, 6, 6)) < 0.7)
    visible |= np.eye(6, dtype=bool)[None]
    want = np.empty(query.shape)
    for b, t, h in np.ndindex(2, 6, 4):
        scores = 0.3 * key[b, :, h // 2] @ query[b, t, h]
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores) * visible[b, t]
        want[b, t, h] = weights / weights.sum() @ value[b, :, h // 2]
    operands = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    operands.append(jnp.asarray(visible))
    for function in (attend, attend_by_matrices):
        got = function(*operands, scale=0.3, soft_cap=soft_cap)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_of_attention_are_those_of_jax():
    rng = np.random.default_rng(0)
    shapes = [(2, 6, h, 8) for h in (4, 2, 2, 4)]
    *operands, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    visible = jnp.tril(jnp.ones((2, 6, 6), bool))

    @partial(jax.jit, static_argnums=0)
    def pull(function, operands):
        return jax.vjp(function, *operands)[1](g)

    ours = pull(lambda *x: attend_by_matrices(*x, visible, scale=0.3), operands)
    jaxs = lambda *x: jax.nn.dot_product_attention(*x, mask=visible[:, None], scale=0.3)
    for got, want in zip(ours, pull(jaxs, operands), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_do_not_depend_on_remat(mixed):
    model, params, tokens = mixed

    def grad(model):
        loss = lambda p: jnp.mean(jnp.square(model.apply({"params": p}, tokens)))
        return jax.jit(jax.grad(loss))

    again = grad(Decoder(model.config, remat=True))(params)
    assert_equal_but_for_rounding(again, grad(model), params)


def test_attention_is_jaxs_off_cpus():
    shapes = [jax.ShapeDtypeStruct((1, 4, n, 8), jnp.bfloat16) for n in (4, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((1, 4, 4), bool))
    text = lambda cap, platform: (
        jax.jit(partial(attend, scale=1.0, soft_cap=cap))
        .trace(*shapes)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    fill = "-2.38197633E+38"  # 0.7 of the smallest float32: what JAX masks scores with
    assert fill in text(None, "cuda") and fill in text(None, "tpu")
    assert fill not in text(None, "cpu") and fill not in text(2.0, "cuda")


@pytest.mark.slow
def test_cached_chunks_equal_the_full_forward_pass(mixed):
    model, params, tokens = mixed
    apply = partial(jax.jit(model.apply), {"params": params})

    def step(cache, start):
        now = jax.lax.dynamic_slice_in_dim(tokens, start, 2, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(2)[None], (2, 2))
        logits, cache = apply(now, positions=positions, cache=cache)
        return cache, logits

    _, logits = jax.lax.scan(step, init_cache(MIXED, 2, 16), jnp.arange(0, 16, 2))
    got = jnp.concatenate(logits, axis=1)
    assert jnp.abs(got).max() > 1
    whole = lambda params: jax.jit(model.apply)({"params": params}, tokens)
    assert_equal_but_for_rounding(got, whole, params)


def test_a_token_sees_its_window_and_its_own_sequence():
    kind = LayerKind(window=3)
    sizes = dict(num_layers=1, num_heads=4, num_kv_heads=2, layers=(kind,))
    model, tokens = Decoder(DecoderConfig(64, 32, 48, **sizes)), jnp.arange(7)[None]
    weights = jax.jit(model.init)(jax.random.key(0), tokens)
    last = jax.jit(
        lambda *args: model.apply(weights, args[0], segment_ids=args[1])[0, -1]
    )
    two = jnp.array([[1, 1, 1, 1, 1, 2, 2]])  # sequences in a row
    for ids, seen in ((tokens * 0 + 1, 3), (two, 2)):
        moved = [last(tokens.at[0, i].set(9), ids) for i in range(7)]
        is_seen = [bool((x != last(tokens, ids)).any()) for x in moved]
        assert is_seen == [False] * (7 - seen) + [True] * seen


@pytest.mark.slow
def test_packed_rows_equal_the_rows_alone(mixed):
    model, params, tokens = mixed
    apply = jax.jit(model.apply)
    packed = jnp.concatenate([tokens[:1, :6], tokens[1:, :10]], axis=1)
    ids = jnp.array([[2] * 6 + [1] * 10])
    places = jnp.array([[*range(6), *range(10)]])
    # LONG's divisors differ: the second sequence has more than 9 tokens.
    rows = tokens[:1, :6], tokens[1:, :10]
    alone = lambda tree: jnp.concatenate([apply(tree, row) for row in rows], axis=1)
    got = apply({"params": params}, packed, segment_ids=ids)
    assert_equal_but_for_rounding(got, alone, {"params": params})
    again = apply({"params": params}, packed, positions=places, segment_ids=ids)
    np.testing.assert_array_equal(again, got)


@pytest.mark.slow
def test_qlora_on_a_mixed_decoder_equals_the_merged_one(mixed):
    model, params, tokens = mixed
    settings = ql.QLoRAConfig(rank=2, block_size=16, targets=r"layers/.*_proj/kernel")
    key = jax.random.key(2)
    base, lora = ql.linen.init(key, model, params, settings, tokens)
    lora = jax.tree.map(lambda x: x + 0.02, lora)
    wrapped = ql.linen.wrap(model, scanned=model.scanned)
    got = jax.jit(wrapped.apply)({"params": base, "lora": lora}, tokens)
    merged = lambda params: jax.jit(model.apply)({"params": params}, tokens)
    assert_equal_but_for_rounding(got, merged, ql.merge(base, lora))
    loss = lambda lora: jnp.sum(
        wrapped.apply({"params": base, "lora": lora}, tokens) ** 2
    )
    grads = jax.jit(jax.grad(loss))(lora)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_segments_do_not_come_with_a_cache(mixed):
    model, params, tokens = mixed
    cache = init_cache(MIXED, 2, 16)
    with pytest.raises(ValueError, match="`segment_ids` must be None with a `cache`"):
        model.apply({"params": params}, tokens, cache=cache, segment_ids=tokens)


def test_names_are_those_of_the_parameters(mixed):
    _, params, _ = mixed
    paths = {
        jax.tree_util.keystr(key, simple=True, separator="/"): x.shape
        for key, x in jax.tree.leaves_with_path(params)
    }
    names = decoder_names(MIXED)
    assert set(names.entries) == set(paths)
    found = names.of("layers/self_attn/qkv_proj/kernel", (4,))
    assert found[3] == "model.layers.3.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (LayerKind(),) * 3}, "`layers` must be one kind or as many"),
        ({"layers": (LayerKind(window=0),)}, "`window` must be positive or None"),
        ({"layers": (LayerKind(Rope(divisors=(1.0,))),)}, "must be empty or 4"),
        ({"rotary_dim": 10}, "`rotary_dim` must be even and at most `head_dim`"),
        ({"activation": "relu"}, "`activation` must be one of"),
        ({"logit_soft_cap": 0.0}, "'logit_soft_cap'. must be positive and finite"),
        ({"layers": (LayerKind(Rope(float("nan"))),)}, r"'ropes\[0\].theta'. must be"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(8, 32, 8, 2, num_heads=4, num_kv_heads=2, **change)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gemma3n", {}, "`model_type` must be one of"),
        ("gemma3", {"text_config": 3}, "values of the kinds that its keys have"),
        ("llama", {"architectures": ["LlamaModel"]}, "`architectures` must be"),
        ("llama", {"num_hidden_layers": 10**9}, "must be positive integers"),
        ("llama", {"hidden_size": "32"}, "must be positive integers"),
        ("llama", {"per_layer_config": {}}, "`per_layer_config` must be null"),
        ("llama", {"rope_scaling": {"type": "ntk"}}, "`rope_type` must be one of"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, r"with \['factor'\]"),
        ("llama", {"rope_scaling": 3}, "values of the kinds that its keys have"),
        ("llama", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1"),
        ("llama", {"rope_parameters": {"a": {}}}, "must be the same for all layers"),
        ("mistral", {"sliding_window": "all"}, "must be a positive integer or null"),
        ("mistral", {"layer_types": ["full_attention"]}, "`layer_types` must be null"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must have 4 entries"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "must be .sliding_att"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "`sliding_window` must"),
        ("gemma2", {"use_bidirectional_attention": True}, "must be false"),
        ("gemma2", {"hidden_activation": "gelu"}, 'must be "gelu_pytorch_tanh"'),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "must be null. Got 5.0"),
        ("smollm3", {"no_rope_layers": [1]}, "an entry for each of 4 layers"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, '"longrope"'),
        (
            "phi3",
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "`short_factor` must have 4 values",
        ),
    ],
)
def test_configs_that_ask_for_more_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({"model_type": kind} | SIZES | change)


def test_broken_configs_are_errors_of_ours():
    """Values of any kind, anywhere: a config, or a ValueError."""
    rng = np.random.default_rng(0)
    values = [None, -1, 0, 7, 2.5, float("nan"), 10**30, "x", [], [1], {}, {"a": 1}]
    values += [True, {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 0}]
    values += [["sliding_attention"] * 4, {"full_attention": {"factor": "x"}}]
    keys = [*SIZES, "head_dim", "rope_scaling", "rope_parameters", "rope_theta"]
    keys += ["layer_types", "sliding_window", "use_sliding_window", "rms_norm_eps"]
    keys += ["max_window_layers", "no_rope_layers", "no_rope_layer_interval"]
    keys += ["query_pre_attn_scalar", "sliding_window_pattern", "architectures"]
    keys += ["final_logit_softcapping", "attn_logit_softcapping", "hidden_act"]
    keys += ["partial_rotary_factor", "original_max_position_embeddings", "model_type"]
    refused = 0
    for _ in range(1000):
        raw = {"model_type": list(FAMILIES)[rng.integers(len(FAMILIES))]} | SIZES
        for _ in range(rng.integers(1, 4)):
            raw[keys[rng.integers(len(keys))]] = values[rng.integers(len(values))]
        try:
            config = config_from_hf(raw)
        except ValueError:
            refused += 1
        else:
            hash(config)
    assert 100 < refused < 1000
