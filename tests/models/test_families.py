"""The decoder's parts, and how the families' configs are read; see also interop/."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_equal_but_for_rounding, trees_of

import qlora_jax as ql
from qlora_jax.models.attention import attend
from qlora_jax.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.models.decoder import Decoder, init_cache
from qlora_jax.models.families import config_from_hf

LONG = Rope(1e4, (1.0, 1.5, 2.0), (3.0, 4.0, 5.0), original_length=9, scale=1.2)
NEAR = Rope(1e2)
KINDS = LayerKind(NEAR, 5), LayerKind(None), LayerKind(LONG, 3), LayerKind(NEAR)
OPTIONS = dict(unit_offset_norms=True, post_norms=True, qk_norms=True, fused=True)
OPTIONS |= dict(activation="gelu_pytorch_tanh", embedding_scale=4.0)
OPTIONS |= dict(attention_soft_cap=5.0, logit_soft_cap=30.0)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=6)
MIXED = DecoderConfig(48, 16, 24, 4, **HEADS, layers=KINDS, **OPTIONS)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}


@pytest.fixture(scope="module")
def mixed():
    model = Decoder(MIXED)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 48)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x + 0.1, params)
    return model, params, tokens


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

    def text(cap, platform):
        traced = jax.jit(partial(attend, scale=1.0, soft_cap=cap)).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    fill = "-2.38197633E+38"  # 0.7 of the smallest float32: what JAX masks scores with
    assert fill in text(None, "cuda") and fill in text(None, "tpu")
    assert fill not in text(None, "cpu") and fill not in text(2.0, "cuda")


def test_a_token_sees_its_window_and_its_own_sequence():
    kind = LayerKind(window=3)
    sizes = dict(num_layers=1, num_heads=4, num_kv_heads=2, layers=(kind,))
    model, tokens = Decoder(DecoderConfig(64, 32, 48, **sizes)), jnp.arange(7)[None]
    weights = jax.jit(model.init)(jax.random.key(0), tokens)
    last = jax.jit(lambda x, ids: model.apply(weights, x, segment_ids=ids)[0, -1])
    two = jnp.array([[1, 1, 1, 1, 1, 2, 2]])  # sequences in a row
    for ids, seen in ((tokens * 0 + 1, 3), (two, 2)):
        moved = [last(tokens.at[0, i].set(9), ids) for i in range(7)]
        is_seen = [bool((x != last(tokens, ids)).any()) for x in moved]
        assert is_seen == [False] * (7 - seen) + [True] * seen


@pytest.mark.slow
def test_qlora_on_a_mixed_decoder_equals_the_merged_one(mixed):
    model, params, tokens = mixed
    targets = r"layers/.*_proj/kernel"
    base, lora = trees_of(params, rank=2, block_size=16, targets=targets)
    wrapped = ql.linen.wrap(model, scanned=model.scanned)
    got = jax.jit(wrapped.apply)({"params": base, "lora": lora}, tokens)
    merged = lambda params: jax.jit(model.apply)({"params": params}, tokens)
    assert_equal_but_for_rounding(got, merged, ql.merge(base, lora))
    apply = lambda lora: wrapped.apply({"params": base, "lora": lora}, tokens)
    grads = jax.jit(jax.grad(lambda lora: jnp.sum(apply(lora) ** 2)))(lora)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_segments_do_not_come_with_a_cache(mixed):
    model, params, tokens = mixed
    cache = init_cache(MIXED, 2, 16)
    with pytest.raises(ValueError, match="`segment_ids` must be None with a `cache`"):
        model.apply({"params": params}, tokens, cache=cache, segment_ids=tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide `num_heads`"),
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
        DecoderConfig(8, 32, 8, 2, **{"num_heads": 4, "num_kv_heads": 2} | change)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gemma3n", {}, "`model_type` must be one of"),
        ("gemma3", {"text_config": 3}, "values of the kinds that its keys have"),
        ("llama", {"architectures": ["LlamaModel"]}, "`architectures` must be"),
        ("llama", {"hidden_act": "gelu"}, '`hidden_act` must be "silu"'),
        ("llama", {"sliding_window": 16}, "`sliding_window` must be null"),
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
        ("phi3", {"rope_scaling": LONGROPE}, "`short_factor` must have 4 values"),
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2}, "must be 1. Got 2"),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": [1]}, r"empty.* Got \[1\]"),
        ("qwen3_moe", EXPERTS | {"num_experts_per_tok": 5}, "`per_token` from 1 to"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "`swiglu_limit` must be 7.0"),
        ("olmoe", EXPERTS | {"clip_qkv": 8.0}, "`clip_qkv` must be null"),
    ],
)
def test_configs_that_ask_for_more_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({"model_type": kind} | SIZES | change)
