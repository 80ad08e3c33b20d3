"""The decoder's parts, and how the families' configs are read; see also interop/."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_equal_but_for_rounding, trees_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.attention import attend, rotary_table
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.config import (
    DecoderConfig,
    LayerKind,
    Rope,
)
from qlora_jax.llm.models.decoder import Decoder, init_cache
from qlora_jax.llm.models.families import config_from_hf, text_only_config
from qlora_jax.llm.models.folder import ModelFolder
from qlora_jax.llm.models.tiny import save_tiny

LONG = Rope(1e4, (1.0, 1.5, 2.0), (3.0, 4.0, 5.0), original_length=9, scale=1.2)
NEAR = Rope(1e2)
KINDS = LayerKind(NEAR, 5), LayerKind(None), LayerKind(LONG, 3), LayerKind(NEAR)
OPTIONS = dict(unit_offset_norms=True, post_norms=True, qk_norms=True, fused=True)
OPTIONS |= dict(activation="gelu_pytorch_tanh", embedding_scale=4.0)
OPTIONS |= dict(attention_soft_cap=5.0, logit_soft_cap=30.0)
HEADS = dict(num_heads=4, num_kv_heads=2, head_dim=8, rotary_dim=6)
MIXED = DecoderConfig(48, 16, 32, 4, **HEADS, layers=KINDS, **OPTIONS)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32}
GEMMA4 = {"hidden_size_per_layer_input": 0}
LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
SHORT = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


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
        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, tokens)))

        return jax.jit(jax.grad(loss))

    again = grad(Decoder(model.config, remat=True))(params)
    assert_equal_but_for_rounding(again, grad(model), params)


def test_attention_is_jaxs_off_cpus():
    shapes = [jax.ShapeDtypeStruct((1, 4, n, 8), jnp.bfloat16) for n in (4, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((1, 4, 4), bool))

    def text(cap, platform):
        traced = jax.jit(partial(attend, scale=1.0, soft_cap=cap)).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    fill = "-2.38197633E+38"  # 0.7 of the smallest float32, with which JAX masks scores
    assert fill in text(None, "cuda") and fill in text(None, "tpu")
    assert fill not in text(None, "cpu") and fill not in text(2.0, "cuda")


def test_a_token_sees_its_window_and_its_own_sequence():
    layers = (LayerKind(window=3),)
    sizes = dict(num_layers=1, num_heads=4, num_kv_heads=2, layers=layers)
    model, tokens = Decoder(DecoderConfig(64, 32, 48, **sizes)), jnp.arange(7)[None]
    weights = jax.jit(model.init)(jax.random.key(0), tokens)
    last_logits = jax.jit(
        lambda x, ids: model.apply(weights, x, segment_ids=ids)[0, -1]
    )
    two_sequences = jnp.array([[1, 1, 1, 1, 1, 2, 2]])  # sequences in a row
    for ids, num_visible in ((tokens * 0 + 1, 3), (two_sequences, 2)):
        logits = [last_logits(tokens.at[0, i].set(9), ids) for i in range(7)]
        is_visible = [bool((x != last_logits(tokens, ids)).any()) for x in logits]
        assert is_visible == [False] * (7 - num_visible) + [True] * num_visible


@pytest.mark.slow
def test_qlora_on_a_mixed_decoder_equals_the_merged_one(mixed):
    model, params, tokens = mixed
    targets = r"layers/.*_proj/kernel"
    base, lora = trees_of(params, rank=2, block_size=16, targets=targets)
    wrapped = ql.linen.wrap(model, scanned=model.scanned)
    got = jax.jit(wrapped.apply)({"params": base, "lora": lora}, tokens)

    def merged(params):
        return jax.jit(model.apply)({"params": params}, tokens)

    assert_equal_but_for_rounding(got, merged, ql.merge(base, lora))

    def apply(lora):
        return wrapped.apply({"params": base, "lora": lora}, tokens)

    grads = jax.jit(jax.grad(lambda lora: jnp.sum(apply(lora) ** 2)))(lora)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_segments_do_not_come_with_a_cache(mixed):
    model, params, tokens = mixed
    cache = init_cache(MIXED, 2, 16)
    with pytest.raises(ValueError, match="`segment_ids` must be None with a `cache`"):
        model.apply({"params": params}, tokens, cache=cache, segment_ids=tokens)


# Keys of the published config.json of each family, besides the common ones.
COMMON = {"_name_or_path": "x", "torch_dtype": "bfloat16", "use_cache": True}
COMMON |= {"attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3]}
COMMON |= {"initializer_range": 0.02, "transformers_version": "4.45.0.dev0"}
COMMON |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": None}
COMMON |= {"hidden_act": "silu", "tie_word_embeddings": True, "pad_token_id": None}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
QWEN = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn"}
YARN |= {"original_max_position_embeddings": 4096, "truncate": False}
QWEN3_VL = {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}}
QWEN3_VL["rope_scaling"] |= {"rope_type": "default"}
QWEN3_VL |= {"attention_bias": False, "head_dim": 8, "rope_theta": 5e6}
GEMMA = {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA |= {"sliding_window": 4096, "query_pre_attn_scalar": 256, "hidden_act": None}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
GEMMA3 |= {"rope_local_base_freq": 10000, "sliding_window_pattern": 6}
SU = {"type": "su", "short_factor": [1.1] * 4, "long_factor": [2.5] * 4}
CODE = {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
MOE |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
GEMMA4_ROPES = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6}
    | {"partial_rotary_factor": 0.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PUBLISHED = {
    "llama, Llama 2": {"max_length": 4096, "pretraining_tp": 1},
    "llama, Llama 3.2": {"rope_scaling": LLAMA3, "attention_bias": False}
    | {"mlp_bias": False, "head_dim": 8, "pretraining_tp": 1},
    "llama, SmolLM2": {"is_llama_config": True, "rope_interleaved": False}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "llama, unsloth": {"unsloth_fixed": True, "unsloth_version": "2024.9"}
    | {"quantization_config": {"quant_method": "bitsandbytes"}},
    "mistral, 7B v0.1": {"sliding_window": 4096},
    "mistral, Nemo": {"sliding_window": None, "head_dim": 8},
    "mixtral, 8x7B": {"num_experts_per_tok": 2, "num_local_experts": 8}
    | {"output_router_logits": False, "router_aux_loss_coef": 0.02}
    | {"router_jitter_noise": 0.0, "sliding_window": None},
    "qwen2, Qwen2.5": QWEN | {"use_mrope": False},
    "qwen3, Qwen3": QWEN | {"head_dim": 8, "attention_bias": False},
    "qwen3_moe, Qwen3": QWEN
    | MOE
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False}
    | {"moe_intermediate_size": 32},
    "qwen2_moe, Qwen1.5": QWEN
    | MOE
    | {"decoder_sparse_step": 1, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 24},
    "olmoe, OLMoE": MOE | {"clip_qkv": None, "attention_bias": False},
    "gpt_oss, 20B": {"attention_bias": True, "experts_per_token": 4}
    | {"head_dim": 8, "initial_context_length": 4096, "num_experts_per_tok": 4}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_local_experts": 32, "output_router_logits": False, "swiglu_limit": 7.0}
    | {"router_aux_loss_coef": 0.9, "rope_scaling": YARN, "sliding_window": 128}
    | {"quantization_config": {"quant_method": "mxfp4"}},
    "gemma2, 2B": GEMMA | CAPS | {"cache_implementation": "hybrid"},
    "gemma2, 9B": GEMMA | CAPS | {"hidden_act": "gelu_pytorch_tanh"},
    "gemma3_text, 1B": GEMMA | GEMMA3 | {"cache_implementation": "hybrid"},
    "gemma3_text, 270M": GEMMA
    | {"_sliding_window_pattern": 6, "use_bidirectional_attention": False}
    | {"layer_types": ["sliding_attention"] * 4, "rope_local_base_freq": 1e4},
    "gemma3, 4B": {"text_config": SIZES | GEMMA | {"model_type": "gemma3_text"}}
    | {"mm_tokens_per_image": 256, "boi_token_index": 1, "eoi_token_index": 2}
    | {"image_token_index": 3, "vision_config": {"hidden_size": 8}}
    | {"eos_token_id": [1, 106], "transformers_version": "4.50.0.dev0"},
    "smollm3, 3B": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 2}
    | {"max_window_layers": 28, "no_rope_layer_interval": 4, "sliding_window": None}
    | {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}
    | {"use_sliding_window": False},
    "gemma4_text, 31B": GEMMA4
    | {"attention_bias": False, "attention_k_eq_v": True, "enable_moe_block": False}
    | {"final_logit_softcapping": 30.0, "global_head_dim": 16, "head_dim": 8}
    | {"hidden_activation": "gelu_pytorch_tanh", "moe_intermediate_size": None}
    | {"num_experts": None, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
    | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    | {"rope_parameters": GEMMA4_ROPES, "sliding_window": 1024, "top_k_experts": None}
    | {"use_bidirectional_attention": "vision", "use_double_wide_mlp": False}
    | {"vocab_size_per_layer_input": 262_144, "rope_theta": None, "hidden_act": None},
    "gemma4_text, 26B-A4B": GEMMA4
    | {"attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 128}
    | {"final_logit_softcapping": 30.0, "global_head_dim": 16, "head_dim": 8}
    | {"hidden_activation": "gelu_pytorch_tanh", "moe_intermediate_size": 16}
    | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    | {"rope_parameters": GEMMA4_ROPES, "sliding_window": 1024, "top_k_experts": 8}
    | {"num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "rope_theta": None}
    | {"hidden_act": None},
    "olmo2, 7B": {"attention_bias": False, "rms_norm_eps": 1e-6},
    "olmo3, 7B": {"attention_bias": False, "layer_types": ["sliding_attention"] * 4}
    | {"rope_scaling": YARN | {"attention_factor": 1.2}, "sliding_window": 4096},
    "gemma, 2B": {"attention_bias": False, "head_dim": 8, "hidden_act": "gelu"}
    | {"hidden_activation": None},
    "gemma, 1.1 7B": {"head_dim": 8, "hidden_act": "gelu_pytorch_tanh"}
    | {"hidden_activation": "gelu_pytorch_tanh"},
    "qwen2_5_vl, 7B": QWEN
    | {"image_token_id": 1, "video_token_id": 2, "vision_token_id": 3}
    | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    | {"vision_start_token_id": 4, "vision_end_token_id": 5, "vision_config": {}},
    "qwen3_vl, 4B": {"image_token_id": 1, "video_token_id": 2, "vision_config": {}}
    | {"vision_start_token_id": 4, "vision_end_token_id": 5}
    | {"text_config": SIZES | QWEN3_VL | {"model_type": "qwen3_vl_text"}},
    "mistral3, Mistral Small 3.1": {"image_token_index": 10, "vision_config": {}}
    | {"multimodal_projector_bias": False, "projector_hidden_act": "gelu"}
    | {"spatial_merge_size": 2, "vision_feature_layer": -1}
    | {"text_config": SIZES | {"model_type": "mistral", "sliding_window": None}},
    "phi3, mini 4k": CODE | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}
    | {"original_max_position_embeddings": 4096, "sliding_window": 2047},
    "phi3, 3.5 mini": CODE | {"rope_scaling": SU, "attention_bias": False}
    | {"original_max_position_embeddings": 4096, "sliding_window": 262144},
    "phi3, 4 mini": CODE
    | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    | {"mlp_bias": False, "attention_bias": False, "partial_rotary_factor": 0.75},
}  # fmt: skip


def test_a_head_of_its_own_in_a_tied_model_is_refused(tmp_path):
    """transformers uses the stored head."""
    folder = save_tiny(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: x[...] for name, x in ql.io.open_safetensors(file).items()}
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    ql.io.write_safetensors(file, tensors | {"lm_head.weight": embedding})
    load(folder, progress=False)
    changed_head = embedding.copy()
    changed_head[-1, -1] += 1
    for head in (changed_head, embedding[1:], embedding[0, 0]):
        ql.io.write_safetensors(file, tensors | {"lm_head.weight": head})
        with pytest.raises(ValueError, match="`tie_word_embeddings` in config.json"):
            load(folder, progress=False)


@pytest.mark.parametrize("length", [None, 0, 512.5, "512"])
def test_a_context_length_is_a_positive_integer(tmp_path, length):
    save_tiny(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text()) | {"max_position_embeddings": length}
    file.write_text(json.dumps(raw))
    message = f"`max_position_embeddings`, which is a positive integer. Got {length!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = ModelFolder(tmp_path).context_length


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_without_a_warning(name):
    raw = {"model_type": name.split(",")[0], **SIZES, **COMMON, **PUBLISHED[name]}
    assert config_from_hf(raw).num_layers == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "`num_kv_heads` must divide"),
        ({"layers": (LayerKind(),) * 3}, "`layers` must have one entry, or one for"),
        ({"layers": (LayerKind(window=0),)}, "`window` must be positive or None"),
        ({"rotary_dim": 10}, "10 rotated values"),
        ({"rotary_dim": -2}, "-2 rotated values"),
        ({"layers": (LayerKind(Rope(dim=-2)),)}, "-2 rotated values"),
        ({"logit_soft_cap": 0.0}, "'logit_soft_cap'. must be positive and finite"),
        ({"layers": (LayerKind(Rope(float("nan"))),)}, r"'ropes\[0\].theta'. must be"),
        ({"num_kv_heads": 0}, "'num_kv_heads'. must be positive integers"),
        ({"intermediate_size": 1.5}, "'intermediate_size'. must be positive integers"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, message):
    sizes = {"intermediate_size": 8, "num_heads": 4, "num_kv_heads": 2}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(8, 32, num_layers=2, **sizes | change)


@pytest.mark.parametrize("length", [4, 8])
def test_pairs_that_are_not_rotated_stay_so_in_long_sequences(length):
    rope = Rope(
        *(1e4, (1.0, 2.0), (4.0, 8.0)),
        original_length=4,
        num_pairs=1,
    )
    positions = np.arange(length)
    table = rotary_table(jnp.asarray(positions)[None], rope, 4, length)[:, 0, :, 0]
    angles = np.stack([positions / (1 if length == 4 else 4), 0 * positions], axis=-1)
    assert_close(table, np.stack([np.cos(angles), np.sin(angles)]))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gemma3n", {}, "`model_type` must be one of"),
        ("gemma3", {"text_config": 3}, "`text_config` must be an object. Got 3"),
        ("llama", {"architectures": 3}, "architectures"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ("llama", {"attention_bias": "no"}, "attention_bias"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("llama", {"max_position_embeddings": "4k"}, "max_position_embeddings"),
        ("llama", {"rope_theta": 0}, "rope_theta"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta"),
        (
            "llama",
            {"rope_scaling": YARN | {"mscale": "1", "mscale_all_dim": 1}},
            "config.json",
        ),
        ("llama", {"rope_scaling": YARN | {"truncate": "false"}}, "`truncate` must be"),
        ("llama", {"architectures": ["LlamaModel"]}, "`architectures` must be"),
        ("llama", {"hidden_act": "gelu"}, '`hidden_act` must be "silu"'),
        ("llama", {"sliding_window": 16}, "`sliding_window` must be null"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("llama", {"hidden_size": "32"}, "hidden_size"),
        ("llama", {"per_layer_config": {}}, "`per_layer_config` must be null"),
        ("llama", {"rope_scaling": {"type": "ntk"}}, "`rope_type` must be one of"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_type"),
        ("llama", {"rope_scaling": YARN | {"factor": 0}}, "factor"),
        ("llama", {"rope_scaling": 3}, "config.json"),
        ("llama", {"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1"),
        ("llama", {"rope_parameters": {"a": {}}}, "must be the same for all layers"),
        ("mistral", {"sliding_window": "all"}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention"]}, "`layer_types` must be null"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": 4}, "layer_types"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": None},
            "max_window_layers",
        ),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "`sliding_window` must"),
        ("gemma", {"use_bidirectional_attention": True}, "must be false"),
        ("gemma", {"hidden_act": "relu"}, 'must be "gelu_pytorch_tanh"'),
        ("gemma2", {"use_bidirectional_attention": True}, "must be false"),
        ("gemma2", {"hidden_activation": "gelu"}, 'must be "gelu_pytorch_tanh"'),
        ("gemma2", {"query_pre_attn_scalar": 0}, "config.json"),
        ("gemma2", {"final_logit_softcapping": True}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "must be null. Got 5.0"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "config.json"),
        ("gemma3_text", {"rope_parameters": YARN}, "a section for each kind of layers"),
        ("smollm3", {"no_rope_layers": [1]}, "config.json"),
        ("smollm3", {"no_rope_layers": ["0"] * 4}, "no_rope_layers"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2}}, "type"),
        ("phi3", {"rope_scaling": LONGROPE}, "short_factor"),
        ("phi3", {"rope_scaling": SHORT | {"long_factor": ["2"] * 4}}, "long_factor"),
        (
            "phi3",
            {"rope_scaling": SHORT, "max_position_embeddings": None},
            "max_position_embeddings",
        ),
        ("llama", {"is_causal": False}, "`is_causal` must be true"),
        ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 0}, "config.json"),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": ["1"]}, "mlp_only_layers"),
        ("qwen3_moe", EXPERTS | {"num_experts_per_tok": 5}, "`per_token` an integer"),
        ("qwen3_moe", EXPERTS | {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("qwen3_moe", EXPERTS | {"norm_topk_prob": "no"}, "norm_topk_prob"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "`swiglu_limit` must be 7.0"),
        ("gpt_oss", {"rope_parameters": {"full_attention": YARN}}, "for all layers"),
        ("olmoe", {"num_experts": 8, "clip_qkv": 8.0}, "`clip_qkv` must be null"),
        ("mistral3", {"text_config": {"model_type": "ministral3"}}, "model_type"),
        ("olmo3", {"rope_parameters": {"factor": 2}}, "a section for each kind"),
        ("gemma4_text", GEMMA4 | {"enable_moe_block": True}, "`count` must"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "must be null or"),
        ("gemma4_text", {"vocab_size_per_layer_input": 8}, "must be `vocab_size`"),
        ("gemma4_text", GEMMA4 | {"rope_parameters": {}}, "rope_theta"),
        ("gemma4_text", GEMMA4 | {"num_kv_shared_layers": 4}, "must leave a layer of"),
        ("gemma4_text", GEMMA4 | {"num_kv_shared_layers": -1}, "num_kv_shared_layers"),
        (
            "gemma4_text",
            GEMMA4 | {"per_layer_config": {"0": {"head_dim": 4}}},
            "must be the same for all layers of a type",
        ),
        (
            "gemma4_text",
            GEMMA4 | {"per_layer_config": {"0": {"hidden_size": 4}}},
            "must have only `head_dim`",
        ),
        ("gemma4_text", GEMMA4 | {"num_key_value_heads": 3}, "must divide"),
        ("qwen3_5_text", {"full_attention_interval": 0}, "config.json"),
        ("qwen3_5_text", {"linear_num_key_heads": 3}, "must divide `num_value_heads`"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_unsupported_configs_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({"model_type": kind} | SIZES | change)


@pytest.mark.parametrize(
    ("kind", "whole", "text", "is_tied"),
    [
        ("mistral3", True, False, True),
        ("mistral3", False, True, False),
        ("mistral3", None, True, True),
        ("gemma3", False, None, False),
        ("qwen3_vl", True, False, True),
        ("qwen2_5_vl", True, False, True),
        ("qwen2_5_vl", False, True, True),
    ],
)
def test_the_config_of_the_whole_model_says_if_its_head_is_tied(
    kind, whole, text, is_tied
):
    """As in transformers 5.24, by the tensors that `save_pretrained` writes."""
    settings = SIZES | {"tie_word_embeddings": text, "head_dim": 8}
    raw = {"model_type": kind, "text_config": settings, "vision_config": {}}
    raw |= {"tie_word_embeddings": whole}
    raw["text_config"]["sliding_window"] = None if kind != "gemma3" else 8
    assert config_from_hf(raw).tie_embeddings is is_tied


def test_null_in_text_settings_is_not_a_missing_key():
    """As in transformers. The published Mistral Small 3.1 has no window."""

    def find_windows(raw):
        return {layer.window for layer in config_from_hf(raw).layers} - {None}

    text = SIZES | {"head_dim": 8}
    raw = {"model_type": "mistral3", "text_config": text | {"sliding_window": None}}
    assert find_windows(raw) == set()
    assert text_only_config(raw)["sliding_window"] is None
    assert find_windows(raw | {"text_config": text}) == {4096}


def test_rotary_sections_of_gemma_3_are_joined():
    """transformers reads `rope_scaling` in addition to the section, not instead."""
    sections = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
    raw = {"model_type": "gemma3_text", **SIZES, "head_dim": 8, "rope_scaling": None}
    raw |= {"rope_parameters": sections, "layer_types": ["full_attention"] * 4}
    raw |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert config_from_hf(raw).layers[0].rope == Rope(5e5, (8.0,) * 4)
