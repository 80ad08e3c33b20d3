"""Gemma 2 and 3: norms around both blocks, and windows in some layers.

Gemma 2 has soft-caps and a window in every other layer. Gemma 3, of which the text half
is computed, has two kinds of rotary positions and a window in five layers of six.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DecoderConfig
from .family import (
    WINDOW_KEYS,
    Family,
    biases,
    read_layers,
    read_rope,
    require,
    shared_fields,
)

_GEMMA3 = ("Gemma3ForCausalLM",)


def _gemma_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that Gemma 2 and 3 read in the same way."""
    if raw.get("use_bidirectional_attention"):
        raise ValueError("`use_bidirectional_attention` must be false. Got true.")
    gelu = ("hidden_activation", "gelu_pytorch_tanh")
    fields = shared_fields(raw, head_dim=256, kv_heads=4, tied=True, activation=gelu)
    fields |= {
        "unit_offset_norms": True,
        "post_norms": True,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }
    return fields | biases(raw)


def _read_gemma2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = _gemma_fields(raw)
    rope = read_rope(raw, fields["head_dim"])
    window = raw.get("sliding_window", 4096)
    return DecoderConfig(
        **fields,
        layers=read_layers(raw, lambda i: i % 2 == 0, window, rope),
        attention_soft_cap=raw.get("attn_logit_softcapping", 50.0),
        logit_soft_cap=raw.get("final_logit_softcapping", 30.0),
    )


def _read_gemma3(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"attn_logit_softcapping": None})
    fields = _gemma_fields(raw)
    # Newer files have a section of rotary positions for each kind of layer.
    sections = raw.get("rope_parameters") or {}
    full = raw.get("rope_scaling") or sections.get("full_attention") or {}
    local = {"rope_theta": raw.get("rope_local_base_freq")}
    local |= sections.get("sliding_attention") or {}
    dim, window = fields["head_dim"], raw.get("sliding_window", 4096)
    ropes = (
        read_rope(raw, dim, theta=1e6, section=full),
        read_rope({**raw, "rope_theta": None}, dim, section=local),
    )
    period = raw.get("sliding_window_pattern", 6)
    layers = read_layers(raw, lambda i: (i + 1) % period != 0, window, *ropes)
    cap = raw.get("final_logit_softcapping")
    return DecoderConfig(**fields, layers=layers, qk_norms=True, logit_soft_cap=cap)


# transformers' defaults for the config of a text half.
_TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of the text half, as that of a text-only model."""
    if raw.get("model_type") != "gemma3":
        return dict(raw)
    family = {"architectures": [*_GEMMA3], "model_type": "gemma3_text"}
    shared_keys = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")
    shared = {key: raw[key] for key in shared_keys if key in raw}
    text = {k: x for k, x in (raw.get("text_config") or {}).items() if x is not None}
    return _TEXT_DEFAULTS | shared | text | family


def _read_text_half(raw: Mapping[str, Any]) -> DecoderConfig:
    return replace(_read_gemma3(text_config(raw)), module="model.language_model")


# Published files have `hidden_act`, but transformers reads `hidden_activation`.
_KEYS = "attention_bias attn_logit_softcapping final_logit_softcapping hidden_act"
_KEYS += " hidden_activation query_pre_attn_scalar use_bidirectional_attention"
_KEYS += f" {WINDOW_KEYS}"
_KEYS3 = f"_sliding_window_pattern rope_local_base_freq sliding_window_pattern {_KEYS}"
_VISION_KEYS = "boi_token_index eoi_token_index image_token_index mm_tokens_per_image"
_VISION_KEYS += f" text_config vision_config {_KEYS3}"
FAMILIES = (
    Family("gemma2", ("Gemma2ForCausalLM",), _read_gemma2, _KEYS),
    Family("gemma3_text", _GEMMA3, _read_gemma3, _KEYS3),
    Family(
        "gemma3", ("Gemma3ForConditionalGeneration",), _read_text_half, _VISION_KEYS
    ),
)
