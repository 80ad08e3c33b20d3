"""Gemma 3, text: two kinds of rotary positions, five layers of six with a window."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import Family, layer_types, layers_by_type, require
from .gemma2 import gemma_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"attn_logit_softcapping": None})
    fields = gemma_fields(raw)
    every = raw.get("sliding_window_pattern", 6)
    sections = raw.get("rope_parameters") or {}
    full = raw.get("rope_scaling") or sections.get("full_attention") or {}
    local = {
        "rope_theta": raw.get("rope_local_base_freq"),
        **(sections.get("sliding_attention") or {}),
    }
    dim = fields["head_dim"]
    layers = layers_by_type(
        layer_types(raw, lambda i: (i + 1) % every != 0),
        sliding=LayerKind(
            read_rope({**raw, "rope_theta": None}, dim, section=local),
            raw.get("sliding_window", 4096),
        ),
        full=LayerKind(read_rope(raw, dim, theta=1e6, section=full)),
    )
    cap = raw.get("final_logit_softcapping")
    return DecoderConfig(**fields, layers=layers, qk_norms=True, logit_soft_cap=cap)


FAMILY = Family("gemma3_text", ("Gemma3ForCausalLM",), _read)
