"""Gemma 2: norms around both blocks, soft-caps, a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import Family, biases, layer_types, layers_by_type, shared_fields
from .ropes import read_rope


def gemma_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that Gemma 2 and 3 read alike."""
    if raw.get("use_bidirectional_attention"):
        raise ValueError("`use_bidirectional_attention` must be false. Got true.")
    gelu = ("hidden_activation", "gelu_pytorch_tanh")
    fields = shared_fields(raw, head_dim=256, kv_heads=4, tied=True, activation=gelu)
    own = {
        "unit_offset_norms": True,
        "post_norms": True,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_scale": raw.get("query_pre_attn_scalar", 256) ** -0.5,
    }
    return fields | own | biases(raw)


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = gemma_fields(raw)
    rope = read_rope(raw, fields["head_dim"])
    layers = layers_by_type(
        layer_types(raw, lambda i: i % 2 == 0),
        sliding=LayerKind(rope, raw.get("sliding_window", 4096)),
        full=LayerKind(rope),
    )
    return DecoderConfig(
        **fields,
        layers=layers,
        attention_soft_cap=raw.get("attn_logit_softcapping", 50.0),
        logit_soft_cap=raw.get("final_logit_softcapping", 30.0),
    )


FAMILY = Family("gemma2", ("Gemma2ForCausalLM",), _read)
