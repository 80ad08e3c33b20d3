"""Qwen2 and Qwen2.5: biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, layers_of_qwen, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=32)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=layers_of_qwen(raw, rope), qkv_bias=True)


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), _read)
