"""Qwen2 and Qwen2.5, with biases on q, k and v; Qwen3, dense, with norms of q and k."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind, Rope
from .family import Family, biases, layer_types, layers_by_type, shared_fields
from .ropes import read_rope


def _layers(raw: Mapping[str, Any], rope: Rope) -> tuple[LayerKind, ...]:
    """Returns the layers; those from `max_window_layers` on may have a window."""
    window = raw.get("sliding_window", 4096)
    window = window if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28) if window is not None else None
    return layers_by_type(
        layer_types(raw, lambda i: first is not None and i >= first),
        sliding=LayerKind(rope, window),
        full=LayerKind(rope),
    )


def _read2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=32)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=_layers(raw, rope), qkv_bias=True)


def _read3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    layers = _layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, **biases(raw), layers=layers, qk_norms=True)


FAMILIES = (
    Family("qwen2", ("Qwen2ForCausalLM",), _read2),
    Family("qwen3", ("Qwen3ForCausalLM",), _read3),
)
