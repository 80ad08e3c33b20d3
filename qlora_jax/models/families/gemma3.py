"""Gemma 3, text: two kinds of rotary positions, five layers of six with a window."""

from collections.abc import Mapping
from dataclasses import replace
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
    local = {"rope_theta": raw.get("rope_local_base_freq")}
    local |= sections.get("sliding_attention") or {}
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


# Defaults of transformers for the config of a text half.
_TEXT = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.json` of the text half, as for a text model."""
    if raw.get("model_type") != "gemma3":
        return dict(raw)
    architectures = list(FAMILY.architectures)
    family = {"architectures": architectures, "model_type": FAMILY.model_type}
    shared = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")
    given = {key: raw[key] for key in shared if key in raw}
    own = {k: x for k, x in (raw.get("text_config") or {}).items() if x is not None}
    return _TEXT | given | own | family


FAMILY = Family("gemma3_text", ("Gemma3ForCausalLM",), _read)
# A vision model, of which the text half is computed.
WITH_VISION = Family(
    "gemma3",
    ("Gemma3ForConditionalGeneration",),
    lambda raw: replace(_read(text_config(raw)), module="model.language_model"),
)
