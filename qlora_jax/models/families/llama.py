"""Llama 2, 3 and 3.x, models of that architecture, such as SmolLM2, and Mistral."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import Family, biases, one_window, require, shared_fields
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


FAMILIES = (
    Family("llama", ("LlamaForCausalLM",), _read_llama),
    Family("mistral", ("MistralForCausalLM",), _read_mistral),  # one window for all
)
