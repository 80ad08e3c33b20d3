"""Phi-3 and Phi-4-mini: fused projections, LongRoPE, partial rotary positions."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, one_window, shared_fields
from .ropes import read_rope, rope_section

_LONGROPE = ("longrope", "su", "yarn")  # the last two in files of older versions


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, eps=1e-5)
    original = raw.get("original_max_position_embeddings", 4096)
    raw = {**raw, "original_max_position_embeddings": original}
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


_KEYS = "hidden_act sliding_window"
FAMILIES = (Family("phi3", ("Phi3ForCausalLM",), _read, _KEYS),)
