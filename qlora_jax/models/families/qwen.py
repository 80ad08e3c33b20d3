"""Qwen2 and Qwen2.5, with biases on q, k and v; Qwen3 with norms of q and k."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind, Rope
from .family import (
    EXPERT_KEYS,
    WINDOW_KEYS,
    Family,
    biases,
    one_window,
    read_experts,
    read_layers,
    require,
    shared_fields,
)
from .ropes import read_rope


def _layers(raw: Mapping[str, Any], rope: Rope) -> tuple[LayerKind, ...]:
    """Returns the layers; those from `max_window_layers` on may have a window."""
    window = raw.get("sliding_window", 4096)
    window = window if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28) if window is not None else None
    is_sliding = lambda i: first is not None and i >= first
    return read_layers(raw, is_sliding, window, rope)


def _read2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=32)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=_layers(raw, rope), qkv_bias=True)


def _read3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    layers = _layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, **biases(raw), layers=layers, qk_norms=True)


def _read3_moe(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a mixture in which all layers have experts."""
    if raw.get("mlp_only_layers"):
        raise ValueError(
            "`mlp_only_layers` must be empty: all layers must have experts. Got "
            f"{raw['mlp_only_layers']}."
        )
    require(raw, {"decoder_sparse_step": 1})
    fields = shared_fields(raw, kv_heads=4)
    fields["intermediate_size"] = raw.get("moe_intermediate_size", 768)
    window = raw if raw.get("use_sliding_window") else {"sliding_window": None}
    layers = one_window(window, read_rope(raw, fields["head_dim"]), 4096)
    normalized = bool(raw.get("norm_topk_prob", False))
    experts = read_experts(raw, 128, 8, normalized=normalized)
    shared = {**fields, **biases(raw), "layers": layers}
    return DecoderConfig(**shared, qk_norms=True, experts=experts)


_KEYS = f"hidden_act max_window_layers use_sliding_window {WINDOW_KEYS}"
_MOE_KEYS = f"decoder_sparse_step mlp_only_layers moe_intermediate_size {EXPERT_KEYS}"
_MOE_KEYS += " attention_bias hidden_act max_window_layers norm_topk_prob"
_MOE_KEYS += " sliding_window use_sliding_window"
FAMILIES = (
    Family("qwen2", ("Qwen2ForCausalLM",), _read2, _KEYS),
    Family("qwen3", ("Qwen3ForCausalLM",), _read3, f"attention_bias {_KEYS}"),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _read3_moe, _MOE_KEYS),
)
