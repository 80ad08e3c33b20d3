"""Qwen3, dense: normalized queries and keys, and a separate head size."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, biases, layers_of_qwen, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    layers = layers_of_qwen(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, **biases(raw), layers=layers, qk_norms=True)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), _read)
