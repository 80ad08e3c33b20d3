"""Families without experts that differ from Llama by options of `DecoderConfig`."""

from collections.abc import Mapping
from typing import Any

from .config import DecoderConfig, LayerKind, QueryScaling
from .family import (
    WINDOW_KEYS,
    Family,
    is_count,
    read_biases,
    read_count,
    read_flag,
    read_layers,
    read_number,
    read_partial_rope,
    read_positive,
    read_rope,
    read_uniform_layers,
    require_if_present,
    rope_section,
    rope_sections,
    shared_fields,
)

# - OLMo 2 has norms after attention and the MLP instead of before them, and norms of q
#   and k. OLMo 3 adds a window in three of four layers.
# - Granite 3 multiplies the embeddings, the attention scores, what a layer adds to the
#   residual stream, and the logits by constant factors.
# - GLM-4 has norms both before and after attention and the MLP. Gate and up are fused.
#   Only a part of each head is rotated, in pairs of neighboring values.
# - Cohere 2 has LayerNorms. In a layer, attention and the MLP have the same input, and
#   run in parallel. Three of four layers have a window, and only these have rotary
#   positions.
# - Arcee has MLPs without a gate, with squared ReLUs.
# - Ministral 3 is a Mistral with YaRN. Its queries are multiplied by a factor that
#   grows with the position.
# - StarCoder2 has LayerNorms with biases, and MLPs without a gate.
# - Seed-OSS has an option for the bias of the output projection.

# The rotary section of Ministral 3, for files without one.
_MINISTRAL3_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0}
_MINISTRAL3_ROPE |= {"original_max_position_embeddings": 16_384}
_MINISTRAL3_ROPE |= {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def _olmo_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    require_if_present(raw, {"clip_qkv": None})
    norms = {"pre_norms": False, "post_norms": True, "qk_norms": "whole"}
    return shared_fields(raw, eps=1e-5) | read_biases(raw) | norms


def _read_olmo2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = _olmo_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    return DecoderConfig(**fields, layers=layers)


def _read_olmo3(raw: Mapping[str, Any]) -> DecoderConfig:
    # transformers uses this base in layers with a window, whatever the file says.
    require_if_present(raw, {"rope_theta": 500_000.0})
    fields = _olmo_fields(raw)
    ropes = (
        read_rope(raw, fields["head_dim"], theta=500_000.0, section=section)
        for section in rope_sections(raw)
    )
    window = raw.get("sliding_window", 4096)
    layers = read_layers(raw, lambda i: (i + 1) % 4 != 0, window, *ropes)
    return DecoderConfig(**fields, layers=layers)


def _read_granite(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw) | read_biases(raw)
    return DecoderConfig(
        **fields,
        layers=(LayerKind(read_rope(raw, fields["head_dim"])),),
        mlp_bias=read_flag(raw, "mlp_bias"),
        embedding_scale=read_positive(raw, "embedding_multiplier", 1.0),
        residual_scale=read_positive(raw, "residual_multiplier", 1.0),
        attention_scale=read_positive(raw, "attention_multiplier", 1.0),
        logit_scale=1 / read_positive(raw, "logits_scaling", 1.0),
    )


def _read_glm4(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=2, eps=1.5625e-7)
    rope, rotary_dim = read_partial_rope(raw, fields["head_dim"], fraction=0.5)
    return DecoderConfig(
        **fields,
        layers=(LayerKind(rope),),
        rotary_dim=rotary_dim,
        interleaved_rope=True,
        post_norms="glm",
        fused="mlp",
        qkv_bias=read_flag(raw, "attention_bias", True),
    )


def _read_cohere2(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, _COHERE2_VALUES)
    fields = shared_fields(raw, tied=True) | read_biases(raw)
    fields["rms_norm_eps"] = read_number(raw, "layer_norm_eps", 1e-5)
    rope, window = read_rope(raw, fields["head_dim"]), raw.get("sliding_window", 4096)
    period = read_count(raw, "sliding_window_pattern", 4)
    return DecoderConfig(
        **fields,
        layers=read_layers(raw, lambda i: (i + 1) % period != 0, window, None, rope),
        interleaved_rope=True,
        layer_norms=True,
        parallel_mlp=True,
        logit_scale=read_positive(raw, "logit_scale", 0.0625),
    )


def _read_seed_oss(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=8)
    return DecoderConfig(
        **fields,
        layers=(LayerKind(read_rope(raw, fields["head_dim"])),),
        qkv_bias=read_flag(raw, "attention_bias", True),
        o_bias=read_flag(raw, "attention_out_bias"),
        mlp_bias=read_flag(raw, "mlp_bias"),
    )


def _read_arcee(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, eps=1e-5, activation=("hidden_act", "relu2"))
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    mlp_bias = read_flag(raw, "mlp_bias")
    fields |= read_biases(raw)
    return DecoderConfig(**fields, layers=layers, gated_mlp=False, mlp_bias=mlp_bias)


def _read_ministral3(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"layer_types": None})  # all layers have the same window
    if raw.get("rope_scaling") is None and raw.get("rope_parameters") is None:
        raw = {**raw, "rope_parameters": _MINISTRAL3_ROPE}
    section = rope_section(raw)
    beta_key, length_key = "llama_4_scaling_beta", "original_max_position_embeddings"
    beta, length = section.get(beta_key), raw.get(length_key) or section.get(length_key)
    if beta is None or length is None or not is_count(length):
        raise ValueError(
            f"`rope_parameters` must have {beta_key!r} and {length_key!r}. Got "
            f"{section}."
        )
    fields = shared_fields(raw, head_dim=128, kv_heads=8, eps=1e-5)
    rope = read_rope(raw, fields["head_dim"])
    layers = read_uniform_layers(raw, rope, default=None)
    scaling = QueryScaling(read_number(section, beta_key), length)
    return DecoderConfig(**fields, layers=layers, query_scaling=scaling)


def _read_starcoder2(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"mlp_type": "default", "norm_type": "layer_norm"})
    activation = ("hidden_act", "gelu_pytorch_tanh")
    fields = shared_fields(raw, kv_heads=2, tied=True, activation=activation)
    fields["rms_norm_eps"] = read_number(raw, "norm_epsilon", 1e-5)
    has_bias = read_flag(raw, "use_bias", True)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(
        **fields,
        layers=read_uniform_layers(raw, rope, default=None),
        layer_norms="biased",
        gated_mlp=False,
        module_names=(("mlp.up_proj", "mlp.c_fc"), ("mlp.down_proj", "mlp.c_proj")),
        qkv_bias=has_bias,
        o_bias=has_bias,
        mlp_bias=has_bias,
    )


_OLMO_KEYS = "attention_bias clip_qkv hidden_act"
# Keys of published files, and the only values that the class in transformers supports.
_COHERE2_VALUES = {
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}
# transformers ignores `layer_switch`, `use_embedding_sharing` and
# `use_parallel_embedding` of published files. The first two repeat other keys.
_COHERE2_KEYS = "attention_bias hidden_act layer_norm_eps layer_switch logit_scale"
_COHERE2_KEYS += " sliding_window_pattern use_embedding_sharing use_parallel_embedding"
_COHERE2_KEYS += f" {WINDOW_KEYS} {' '.join(_COHERE2_VALUES)}"
_ARCEE_KEYS = "attention_bias hidden_act mlp_bias"
_MINISTRAL3_KEYS = "hidden_act layer_types llama_4_scaling_beta sliding_window"
_STARCODER2_KEYS = "hidden_act mlp_type norm_epsilon norm_type sliding_window use_bias"
# Keys of GPTBigCode in published files, which transformers ignores.
_STARCODER2_KEYS += " activation_function attention_softmax_in_fp32 layer_norm_epsilon"
_STARCODER2_KEYS += " scale_attention_softmax_in_fp32 scale_attn_weights"
_SEED_OSS_KEYS = "attention_bias attention_out_bias hidden_act mlp_bias"
_GRANITE_KEYS = "attention_bias attention_multiplier embedding_multiplier hidden_act"
_GRANITE_KEYS += " logits_scaling mlp_bias residual_multiplier"
DENSE_FAMILIES = (
    Family("olmo2", ("Olmo2ForCausalLM",), _read_olmo2, _OLMO_KEYS),
    Family("olmo3", ("Olmo3ForCausalLM",), _read_olmo3, f"{_OLMO_KEYS} {WINDOW_KEYS}"),
    Family("granite", ("GraniteForCausalLM",), _read_granite, _GRANITE_KEYS),
    Family("arcee", ("ArceeForCausalLM",), _read_arcee, _ARCEE_KEYS),
    Family("cohere2", ("Cohere2ForCausalLM",), _read_cohere2, _COHERE2_KEYS),
    Family("glm4", ("Glm4ForCausalLM",), _read_glm4, "attention_bias hidden_act"),
    Family(
        "ministral3", ("Ministral3ForCausalLM",), _read_ministral3, _MINISTRAL3_KEYS
    ),
    Family("seed_oss", ("SeedOssForCausalLM",), _read_seed_oss, _SEED_OSS_KEYS),
    Family(
        "starcoder2", ("Starcoder2ForCausalLM",), _read_starcoder2, _STARCODER2_KEYS
    ),
)
