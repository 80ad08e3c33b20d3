"""SmolLM3: Llama's architecture, every fourth layer without rotary positions."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..config import DecoderConfig
from .family import WINDOW_KEYS, Family, biases, read_layers, shared_fields
from .ropes import read_rope


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=4, tied=True)
    count, step = fields["num_layers"], raw.get("no_rope_layer_interval", 4)
    turns = raw.get("no_rope_layers")
    turns = [(i + 1) % step for i in range(count)] if turns is None else turns
    if len(turns) < count:
        raise ValueError(
            f"`no_rope_layers` must have an entry for each of {count} layers. "
            f"Got {len(turns)}."
        )
    window = raw.get("sliding_window")
    has_windows = bool(raw.get("use_sliding_window", False)) and window is not None
    rope = read_rope(raw, fields["head_dim"], theta=2e6)
    every = read_layers(raw, lambda i: has_windows and not turns[i], window, rope)
    pairs = zip(every, turns, strict=False)
    layers = tuple(kind if turn else replace(kind, rope=None) for kind, turn in pairs)
    in_mlp = bool(raw.get("mlp_bias", False))
    return DecoderConfig(**fields, **biases(raw), layers=layers, mlp_bias=in_mlp)


_KEYS = "attention_bias hidden_act max_window_layers mlp_bias no_rope_layer_interval"
_KEYS += f" no_rope_layers use_sliding_window {WINDOW_KEYS}"
FAMILIES = (Family("smollm3", ("SmolLM3ForCausalLM",), _read, _KEYS),)
