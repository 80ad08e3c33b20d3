"""Qwen3, dense: normalized queries and keys, and a separate head size."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, layers_of_qwen, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    rope = read_rope(raw, fields["head_dim"])
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        **fields,
        layers=layers_of_qwen(raw, rope),
        qk_norms=True,
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), _read)
