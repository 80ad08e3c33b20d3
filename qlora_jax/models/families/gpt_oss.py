"""gpt-oss: experts with biases, sinks, and a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from .family import (
    EXPERT_KEYS,
    WINDOW_KEYS,
    Family,
    biases,
    read_experts,
    read_layers,
    require,
    shared_fields,
)
from .ropes import read_rope

NAMES = {"interleaved": True, "router": "mlp.router"}
NAMES |= {"kernel": "mlp.experts.NAME.{expert}"}
ACTIVATION = "clamped_swiglu"
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(raw: Mapping[str, Any]) -> DecoderConfig:
    require(raw, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0})
    fields = shared_fields(raw, head_dim=64, kv_heads=8, eps=1e-5)
    section = raw.get("rope_scaling") or raw.get("rope_parameters") or _YARN
    rope = read_rope(raw, fields["head_dim"], theta=150_000.0, section=section)
    window = raw.get("sliding_window", 128)
    layers = read_layers(raw, lambda i: i % 2 == 0, window, rope)
    experts = read_experts(raw, 128, 4, **NAMES)
    own = {"activation": ACTIVATION, "mlp_bias": True, "sinks": True}
    own |= biases({"attention_bias": True, **raw})
    return DecoderConfig(**{**fields, **own}, layers=layers, experts=experts)


# The two names of numbers that the published files give twice are harmless.
_KEYS = "attention_bias experts_per_token hidden_act initial_context_length"
_KEYS += f" swiglu_alpha swiglu_limit {WINDOW_KEYS} {EXPERT_KEYS}"
FAMILIES = (Family("gpt_oss", ("GptOssForCausalLM",), _read, _KEYS),)
