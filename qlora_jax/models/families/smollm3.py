"""SmolLM3: Llama's architecture, every fourth layer without rotary positions."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig, LayerKind
from .family import Family, biases, layer_types, layers_by_type, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=4, tied=True)
    count, every = fields["num_layers"], raw.get("no_rope_layer_interval", 4)
    turns = raw.get("no_rope_layers")
    turns = [(i + 1) % every for i in range(count)] if turns is None else turns
    if len(turns) < count:
        raise ValueError(
            f"`no_rope_layers` must have an entry for each of {count} layers. "
            f"Got {len(turns)}."
        )
    window = raw.get("sliding_window")
    has_windows = bool(raw.get("use_sliding_window", False)) and window is not None
    types = layer_types(raw, lambda i: has_windows and not turns[i])
    rope = read_rope(raw, fields["head_dim"], theta=2e6)
    kinds = [
        layers_by_type([kind], LayerKind(own, window), LayerKind(own))[0]
        for kind, own in zip(types, (rope if t else None for t in turns), strict=False)
    ]
    layers, in_mlp = tuple(kinds), bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=in_mlp)


FAMILIES = (Family("smollm3", ("SmolLM3ForCausalLM",), _read),)
