"""Llama 2, 3 and 3.x, and models of that architecture, such as SmolLM2."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import Family, biases, require, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"sliding_window": None})
    fields = shared_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    in_mlp = bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=in_mlp)


FAMILY = Family("llama", ("LlamaForCausalLM",), _read)
