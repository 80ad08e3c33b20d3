"""Mixtures of experts: Mixtral, OLMoE, Qwen3-MoE and gpt-oss.

Mixtral is a Mistral with experts. In gpt-oss, experts have biases, attention has sinks,
and every other layer has a window.
"""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import (
    EXPERT_KEYS,
    WINDOW_KEYS,
    Family,
    biases,
    one_window,
    read_experts,
    read_layers,
    read_rope,
    require,
    shared_fields,
)

# Fields of `Experts`, which GGUF's configs share.
MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "names": ("w1", "w3", "w2"),
    "kernel": "block_sparse_moe.experts.{expert}.NAME.weight",
}
GPT_OSS_EXPERTS = {
    "interleaved": True,
    "router": "mlp.router",
    "kernel": "mlp.experts.NAME.{expert}",
}
# The rotary positions of a gpt-oss whose file has none.
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_mixtral(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=8, eps=1e-5)
    experts = read_experts(raw, 8, 2, **MIXTRAL_EXPERTS)
    rope = read_rope(raw, fields["head_dim"], theta=1e6)
    layers = one_window(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, experts=experts)


def _read_olmoe(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"clip_qkv": None})
    fields = shared_fields(raw, eps=1e-5) | biases(raw)
    normalized = bool(raw.get("norm_topk_prob", False))
    experts = read_experts(raw, 64, 8, factor=0.01, normalized=normalized)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    return DecoderConfig(**fields, layers=layers, experts=experts, qk_norms="whole")


def _read_qwen3_moe(raw: Mapping[str, Any]) -> DecoderConfig:
    if raw.get("mlp_only_layers"):
        raise ValueError(
            "`mlp_only_layers` must be empty: all layers must have experts. Got "
            f"{raw['mlp_only_layers']}."
        )
    require(raw, {"decoder_sparse_step": 1})
    fields = shared_fields(raw, kv_heads=4) | biases(raw)
    fields["intermediate_size"] = raw.get("moe_intermediate_size", 768)
    windows = raw if raw.get("use_sliding_window") else {"sliding_window": None}
    layers = one_window(windows, read_rope(raw, fields["head_dim"]), 4096)
    normalized = bool(raw.get("norm_topk_prob", False))
    experts = read_experts(raw, 128, 8, normalized=normalized)
    return DecoderConfig(**fields, layers=layers, qk_norms=True, experts=experts)


def _read_gpt_oss(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0})
    fields = shared_fields(raw, head_dim=64, kv_heads=8, eps=1e-5)
    fields |= {"activation": "clamped_swiglu", "mlp_bias": True, "sinks": True}
    fields |= biases({"attention_bias": True, **raw})
    section = raw.get("rope_scaling") or raw.get("rope_parameters") or _GPT_OSS_ROPE
    rope = read_rope(raw, fields["head_dim"], theta=150_000.0, section=section)
    window = raw.get("sliding_window", 128)
    layers = read_layers(raw, lambda i: i % 2 == 0, window, rope)
    experts = read_experts(raw, 128, 4, **GPT_OSS_EXPERTS)
    return DecoderConfig(**fields, layers=layers, experts=experts)


_QWEN3_KEYS = "decoder_sparse_step mlp_only_layers moe_intermediate_size"
_QWEN3_KEYS += " attention_bias hidden_act max_window_layers norm_topk_prob"
_QWEN3_KEYS += f" sliding_window use_sliding_window {EXPERT_KEYS}"
# `experts_per_token` and `initial_context_length` repeat other keys in published files.
_GPT_OSS_KEYS = "attention_bias experts_per_token hidden_act initial_context_length"
_GPT_OSS_KEYS += f" swiglu_alpha swiglu_limit {WINDOW_KEYS} {EXPERT_KEYS}"
FAMILIES = (
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        _read_mixtral,
        f"hidden_act sliding_window {EXPERT_KEYS}",
    ),
    Family(
        "olmoe",
        ("OlmoeForCausalLM",),
        _read_olmoe,
        f"attention_bias clip_qkv hidden_act norm_topk_prob {EXPERT_KEYS}",
    ),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _read_qwen3_moe, _QWEN3_KEYS),
    Family("gpt_oss", ("GptOssForCausalLM",), _read_gpt_oss, _GPT_OSS_KEYS),
)
