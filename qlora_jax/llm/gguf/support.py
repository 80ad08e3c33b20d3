"""Checks that llama.cpp computes the same as a decoder."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..models.config import DecoderConfig, Experts, LayerKind, Rope
from ..models.rope import read_rope
from .metadata import (
    OSS,
    QWEN3_5,
    WINDOW_PERIODS,
    main_layer,
    nearest_architecture,
    values_of,
)

# The fields of `DecoderConfig` that all files hold, or that are checked below.
_STORED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
_STORED += ("num_kv_heads", "head_dim", "rms_norm_eps", "layers", "experts", "module")
# The fields that only the files of some architectures hold.
_STORED_BY = {
    "llama": ("qkv_bias", "o_bias", "mlp_bias"),
    "qwen2": ("qkv_bias",),
    **dict.fromkeys(("phi3", *QWEN3_5), ("rotary_dim",)),
}
# The options that differ from the defaults of `DecoderConfig`, by architecture.
_GEMMA = {"unit_offset_norms": True, "activation": "gelu_pytorch_tanh"}
_OPTIONS: dict[str, Mapping[str, object]] = {
    "gemma": _GEMMA | {"tie_embeddings": True},
    "gemma2": _GEMMA | {"tie_embeddings": True, "post_norms": True},
    "gemma3": _GEMMA | {"post_norms": True, "qk_norms": True},
    "olmo2": {"pre_norms": False, "post_norms": True, "qk_norms": "whole"},
    "olmoe": {"qk_norms": "whole", "tie_embeddings": False},
    OSS: {"activation": "clamped_swiglu", "tie_embeddings": False}
    | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "sinks"), True),
    "phi3": {"fused": True},
    **dict.fromkeys(("qwen3", "qwen3moe"), {"qk_norms": True}),
    **dict.fromkeys(
        QWEN3_5, {"unit_offset_norms": True, "qk_norms": True, "attention_gate": True}
    ),
}
# llama.cpp recognizes Gemma's 27B models by their number of layers. They scale
# attention scores by `(hidden_size // num_heads) ** -0.5`.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_NO_ROPE_PERIOD = 4  # every 4th layer of SmolLM3 has no rotary positions


def check_gguf_config(config: DecoderConfig, context: int) -> str:
    """Returns a decoder's architecture; raises if llama.cpp's logits would differ."""
    architecture = nearest_architecture(config)
    # 1. Compare all fields but the layers.
    differences = [
        f"`{name}`={getattr(config, name)!r}"
        for name, value in _options_of(config, architecture).items()
        if _round(getattr(config, name)) != _round(value)
    ]
    # 2. Compare the layers. A window that covers the whole context has no effect.
    layers = _layers_of(config, architecture, context)
    windows, expected_windows = (
        [min(layer.window or context, context) for layer in kinds]
        for kinds in (config.layers, layers)
    )
    if windows != expected_windows:
        differences += ["these sliding windows"]
    pairs = [*zip(config.layers, layers, strict=True)]
    if any(ours.structure != theirs.structure for ours, theirs in pairs):
        differences += ["layers of these structures"]
    if any(_round(ours.rope) != _round(theirs.rope) for ours, theirs in pairs):
        differences += ["these rotary positions"]
    # In a gated delta rule of llama.cpp, keys and values have the same size.
    rule = config.delta_rule
    if rule is not None and rule.key_dim != rule.value_dim:
        differences += [f"`key_dim` other than `value_dim` in {rule}"]
    # 3. Some architectures require `num_heads * head_dim == hidden_size`.
    heads = {config.num_heads}
    heads |= {config.num_kv_heads} if architecture == "olmoe" else set()
    fills_hidden = {n * config.head_dim for n in heads} == {config.hidden_size}
    if architecture in ("phi3", "olmoe", "olmo2", "qwen2") and not fills_hidden:
        differences += ["heads whose total width is not `hidden_size`"]
    if differences:
        raise ValueError(
            "a model in GGUF must be one that llama.cpp supports. As "
            f'"{architecture}" it does not support {", ".join(differences)}.'
        )
    if architecture == OSS:
        _warn_about_yarn(config)
    return architecture


def _options_of(config: DecoderConfig, architecture: str) -> dict[str, object]:
    """Returns the fields of `DecoderConfig` as llama.cpp builds the decoder.

    Fields that a file holds with any value are left out.
    """
    c = config
    options: dict[str, object] = {
        field.name: field.default for field in dataclasses.fields(DecoderConfig)
    }
    # Most models can have a head of their own.
    options["tie_embeddings"] = c.tie_embeddings
    options |= {"rotary_dim": c.head_dim, "attention_scale": c.head_dim**-0.5}
    options |= _OPTIONS.get(architecture, {})
    if architecture.startswith("gemma"):
        options["embedding_scale"] = c.hidden_size**0.5
    if c.num_layers == _LAYERS_OF_27B.get(architecture):
        options["attention_scale"] = (c.hidden_size // c.num_heads) ** -0.5
    if architecture == "gemma2":  # always has caps; a file without a value means these
        options["attention_soft_cap"] = c.attention_soft_cap or 50.0
        options["logit_soft_cap"] = c.logit_soft_cap or 30.0
    for name in (*_STORED, *_STORED_BY.get(architecture, ())):
        del options[name]
    if c.experts is not None:
        options["experts"] = _experts_of(c.experts, architecture)
    return options


def _experts_of(experts: Experts, architecture: str) -> Experts:
    names = ("router", "kernel", "names")  # llama.cpp has names of its own
    return Experts(
        experts.count,
        experts.per_token,
        normalized=architecture != "olmoe",
        joined="alternating" if architecture == OSS else None,
        shared_width=experts.shared_width if architecture == "qwen35moe" else 0,
        **{name: getattr(experts, name) for name in names},
    )


def _layers_of(
    config: DecoderConfig, architecture: str, context: int
) -> list[LayerKind]:
    """Returns the kinds of layers of which llama.cpp builds the decoder."""
    rope = _rope_of(config, architecture)
    window_period = WINDOW_PERIODS.get(architecture, 1)
    values: dict[str, Any] = values_of(config, architecture, context)
    window = values.get("attention.sliding_window", 4096)
    delta_period = values.get("full_attention_interval", 1)
    layers = []
    for number in range(1, config.num_layers + 1):
        kind = LayerKind(rope)
        if number % window_period:
            local = Rope() if architecture == "gemma3" else rope
            kind = LayerKind(local, window)
        elif number % delta_period:
            kind = LayerKind(None, delta_rule=config.delta_rule)
        elif architecture == "smollm3" and number % _NO_ROPE_PERIOD == 0:
            kind = LayerKind(None)
        layers.append(kind)
    return layers


def _rope_of(config: DecoderConfig, architecture: str) -> Rope:
    """Returns the rotary positions of llama.cpp's layers without a window."""
    rope = main_layer(config).rope or Rope()
    if architecture == "phi3":
        return dataclasses.replace(rope, dim=0, num_pairs=0)
    if architecture == OSS and rope.original_length:
        return _stretch_by_yarn(config, truncate=False)
    # Only Llama has a divisor for each frequency.
    has_divisors = architecture == "llama" or len(set(rope.divisors)) == 1
    return Rope(rope.theta, rope.divisors if has_divisors else ())


def _stretch_by_yarn(config: DecoderConfig, *, truncate: bool) -> Rope:
    rope = main_layer(config).rope or Rope()
    section = {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": rope.divisors[-1],
        "original_max_position_embeddings": rope.original_length,
        "truncate": truncate,
    }
    return read_rope(section, config.rotary_dim, rope.original_length)


def _warn_about_yarn(config: DecoderConfig) -> None:
    """Warns if frequencies change because llama.cpp rounds the bounds of YaRN's ramp.

    Between these bounds, YaRN blends stretched and original frequencies.
    """
    rope = main_layer(config).rope or Rope()
    if not rope.original_length:
        return
    computed = _stretch_by_yarn(config, truncate=True).divisors
    change = max(abs(a / b - 1) for a, b in zip(computed, rope.divisors, strict=True))
    if change > 1e-3:
        warnings.warn(
            "llama.cpp rounds the bounds of YaRN's ramp to whole pairs, which changes "
            f"frequencies of gpt-oss by up to {change:.1%}.",
            stacklevel=3,
        )


def _round(x: object) -> object:
    """Rounds numbers to float32, as GGUF stores them; dataclasses become tuples."""
    if dataclasses.is_dataclass(x):
        fields = (field for field in dataclasses.fields(x) if field.compare)
        return _round(tuple(getattr(x, field.name) for field in fields))
    if isinstance(x, tuple):
        return tuple(map(_round, x))
    return float(np.float32(x)) if isinstance(x, float) else x
