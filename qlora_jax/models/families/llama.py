"""Llama 2, 3 and 3.x, models of that architecture, such as SmolLM2, and Mistral.

Mixtral, which is Mistral with experts, and OLMoE.
"""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import (
    EXPERT_KEYS,
    Family,
    biases,
    one_window,
    read_experts,
    require,
    shared_fields,
)
from .ropes import read_rope


def _read_llama(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"sliding_window": None})
    fields = shared_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    in_mlp = bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=in_mlp)


def _read_mistral(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"layer_types": None})
    fields = shared_fields(raw, kv_heads=8)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=one_window(raw, rope, default=4096))


NAMES = {"router": "block_sparse_moe.gate", "names": ("w1", "w3", "w2")}
NAMES |= {"kernel": "block_sparse_moe.experts.{expert}.NAME.weight"}


def _read_mixtral(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=8, eps=1e-5)
    experts = read_experts(raw, 8, 2, **NAMES)
    rope = read_rope(raw, fields["head_dim"], theta=1e6)
    layers = one_window(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, experts=experts)


def _read_olmoe(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"clip_qkv": None})
    fields = shared_fields(raw, eps=1e-5)
    normalized = bool(raw.get("norm_topk_prob", False))
    experts = read_experts(raw, 64, 8, factor=0.01, normalized=normalized)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    more = {**biases(raw), "layers": layers, "experts": experts}
    return DecoderConfig(**fields, **more, qk_norms="whole")


FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        _read_llama,
        "attention_bias hidden_act mlp_bias sliding_window",
    ),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        _read_mistral,
        "hidden_act layer_types sliding_window",  # one window for all
    ),
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
)
