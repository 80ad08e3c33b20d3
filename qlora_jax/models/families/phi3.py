"""Phi-3 and Phi-4-mini: fused projections, LongRoPE, partial rotary positions."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import Family, one_window, shared_fields
from .ropes import read_rope, rope_section, rotary_dim

_LONGROPE = ("longrope", "su", "yarn")  # the last two in files of older versions


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, eps=1e-5)
    dim = rotary_dim(raw, fields["head_dim"])
    section = dict(rope_section(raw))
    kind = section.pop("type", None)
    kind = section.get("rope_type") or kind or "default"
    if kind not in ("default", *_LONGROPE):
        raise ValueError(f'`rope_type` must be "default" or "longrope". Got {kind!r}.')
    section["rope_type"] = "longrope" if kind in _LONGROPE else kind
    original = raw.get("original_max_position_embeddings", 4096)
    raw = {**raw, "original_max_position_embeddings": original}
    for given in (raw, section):  # read above
        given.pop("partial_rotary_factor", None)
    rope = read_rope(raw, dim, section=section)
    layers = one_window(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, rotary_dim=dim, fused=True)


FAMILIES = (Family("phi3", ("Phi3ForCausalLM",), _read),)
