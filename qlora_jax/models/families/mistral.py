"""Mistral 7B and models like it: Llama with one window for all layers."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, one_window, require, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"layer_types": None})
    fields = shared_fields(raw, kv_heads=8)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=one_window(raw, rope, default=4096))


FAMILY = Family("mistral", ("MistralForCausalLM",), _read)
