"""Llama, Mistral, Qwen, SmolLM3 and Phi.

They share Llama's architecture. Qwen2 adds biases on q, k and v, and Qwen3 norms of q
and k. SmolLM3 has no rotary positions in every fourth layer. Phi-3 and Phi-4-mini have
fused projections, LongRoPE and partial rotary positions. SmolLM2 is a Llama.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DecoderConfig, LayerKind, Rope
from .family import (
    WINDOW_KEYS,
    Family,
    biases,
    one_window,
    read_layers,
    read_rope,
    require,
    rope_section,
    shared_fields,
)

_LONGROPE = ("longrope", "su", "yarn")  # older files of Phi have the last two names


def _read_llama(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"sliding_window": None})
    fields = shared_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    mlp_bias = bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=mlp_bias)


def _read_mistral(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"layer_types": None})  # all layers have the same window
    fields = shared_fields(raw, kv_heads=8)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=one_window(raw, rope, default=4096))


def _qwen_layers(raw: Mapping[str, Any], rope: Rope) -> tuple[LayerKind, ...]:
    """Returns the layers; those from `max_window_layers` on may have a window."""
    window = raw.get("sliding_window", 4096)
    window = window if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28) if window is not None else None

    def is_sliding(index: int) -> bool:
        return first is not None and index >= first

    return read_layers(raw, is_sliding, window, rope)


def _read_qwen2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=32)
    layers = _qwen_layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, layers=layers, qkv_bias=True)


def _read_qwen3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    layers = _qwen_layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, **biases(raw), layers=layers, qk_norms=True)


def _read_smollm3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=4, tied=True)
    count, step = fields["num_layers"], raw.get("no_rope_layer_interval", 4)
    # Despite its name, `no_rope_layers` has 1 for layers with rotary positions.
    has_rope = raw.get("no_rope_layers")
    if has_rope is None:
        has_rope = [(i + 1) % step for i in range(count)]
    if len(has_rope) < count:
        raise ValueError(
            f"`no_rope_layers` must have an entry for each of {count} layers. "
            f"Got {len(has_rope)}."
        )
    window = raw.get("sliding_window")
    has_windows = bool(raw.get("use_sliding_window", False)) and window is not None
    rope = read_rope(raw, fields["head_dim"], theta=2e6)
    kinds = read_layers(raw, lambda i: has_windows and not has_rope[i], window, rope)
    layers = tuple(
        kind if is_rotary else replace(kind, rope=None)
        for kind, is_rotary in zip(kinds, has_rope, strict=False)
    )
    mlp_bias = bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=mlp_bias)


def _read_phi3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, eps=1e-5)
    original = raw.get("original_max_position_embeddings", 4096)
    raw = {**raw, "original_max_position_embeddings": original}
    # Here `partial_rotary_factor` is supported; `read_rope` would reject it.
    section = dict(rope_section(raw))
    share = raw.pop("partial_rotary_factor", None)
    share = section.pop("partial_rotary_factor", share)
    dim = int(fields["head_dim"] * (1.0 if share is None else share))
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in ("default", *_LONGROPE):
        raise ValueError(f'`rope_type` must be "default" or "longrope". Got {kind!r}.')
    section["rope_type"] = "longrope" if kind in _LONGROPE else kind
    rope = read_rope(raw, dim, section=section)
    layers = one_window(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, rotary_dim=dim, fused=True)


_QWEN_KEYS = f"hidden_act max_window_layers use_sliding_window {WINDOW_KEYS}"
_SMOLLM3_KEYS = "attention_bias hidden_act max_window_layers mlp_bias no_rope_layers"
_SMOLLM3_KEYS += f" no_rope_layer_interval use_sliding_window {WINDOW_KEYS}"
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
        "hidden_act layer_types sliding_window",
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), _read_qwen2, _QWEN_KEYS),
    Family("qwen3", ("Qwen3ForCausalLM",), _read_qwen3, f"attention_bias {_QWEN_KEYS}"),
    Family("smollm3", ("SmolLM3ForCausalLM",), _read_smollm3, _SMOLLM3_KEYS),
    Family("phi3", ("Phi3ForCausalLM",), _read_phi3, "hidden_act sliding_window"),
)
