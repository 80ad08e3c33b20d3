"""Converts a `DecoderConfig` to llama.cpp's metadata values."""

import dataclasses
import warnings
from typing import Any

import numpy as np

from ..models.config import DecoderConfig, LayerKind, Rope
from ..models.family import read_rope
from .values_in import (
    BIAS_TENSORS,
    EXPERT_KEYS,
    FREQUENCIES,
    LONG,
    OSS,
    QWEN3_5,
    SHORT,
    WINDOW_PERIODS,
    Divisors,
    config_from_values,
    size_keys,
)


def nearest_architecture(config: DecoderConfig) -> str:
    """Returns the llama.cpp architecture that is most similar to a decoder."""
    c = config
    if c.delta_rule is not None:
        return "qwen35" if c.experts is None else "qwen35moe"
    if c.experts is not None:
        if c.sinks:
            return OSS
        if c.qk_norms == "whole":
            return "olmoe"
        return "qwen3moe" if c.qk_norms else "llama"
    if c.fused:
        return "phi3"
    if not c.pre_norms:
        return "olmo2"
    if c.unit_offset_norms and not c.post_norms:
        return "gemma"
    if c.post_norms:
        return "gemma3" if c.qk_norms else "gemma2"
    if None in c.ropes:
        return "smollm3"
    if c.qk_norms:
        return "qwen3"
    return "qwen2" if c.qkv_bias and not (c.o_bias or c.mlp_bias) else "llama"


def values_of(config: DecoderConfig, architecture: str, context: int) -> dict[str, Any]:
    """Returns the metadata values of a config for an architecture."""
    # 1. The values that all architectures have.
    c, main_layer = config, _main_layer(config)
    rope = main_layer.rope or Rope()
    windows = [layer.window for layer in c.layers if layer.window is not None]
    values = {
        "context_length": context,
        "vocab_size": c.vocab_size,
        **{key: getattr(c, name) for name, key in size_keys(architecture).items()},
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(rope.theta),
    }
    # 2. Experts, windows and soft-caps. gpt-oss must have the key for a window. Without
    # a window, its value is the context length.
    if c.experts is not None:
        values |= {key: getattr(c.experts, name) for name, key in EXPERT_KEYS.items()}
    if architecture in WINDOW_PERIODS and (windows or architecture == OSS):
        values["attention.sliding_window"] = windows[0] if windows else context
    if architecture == "gemma2":
        caps = {"attn": c.attention_soft_cap, "final": c.logit_soft_cap}
        for name, cap in caps.items():
            if cap is not None:
                values[f"{name}_logit_softcapping"] = float(cap)
    if architecture in QWEN3_5:
        values |= _delta_rule_values(c)
    # 3. Stretched rotary positions; see also `divisors_of`. YaRN divides the lowest
    # frequency, which is the last one, by its factor.
    if architecture == "phi3":
        values["attention.sliding_window"] = main_layer.window or 0
        values["rope.scaling.original_context_length"] = rope.original_length or context
        values["rope.scaling.attn_factor"] = float(rope.scale)
    elif architecture == OSS and rope.original_length:
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(rope.divisors[-1])
        values["rope.scaling.original_context_length"] = rope.original_length
    elif len(set(rope.divisors)) == 1:
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(rope.divisors[0])
    return values


def _delta_rule_values(config: DecoderConfig) -> dict[str, Any]:
    """Returns the values of Qwen3.5 that other architectures lack."""
    rule = config.delta_rule
    assert rule is not None
    attends = [kind.delta_rule is None for kind in config.layers]
    pairs = config.rotary_dim // 2
    values = {
        "ssm.conv_kernel": rule.conv_width,
        "ssm.state_size": rule.key_dim,
        "ssm.group_count": rule.num_key_heads,
        "ssm.time_step_rank": rule.num_value_heads,
        "ssm.inner_size": rule.num_value_heads * rule.value_dim,
        "full_attention_interval": 1 + attends.index(True),
        # The position of a token consists of a time, a height and a width, which are
        # equal in text. Pair i of the rotated pairs uses number i % 3 of the three. The
        # value is how many pairs use each of them; the fourth count is always 0.
        "rope.dimension_sections": [*(len(range(i, pairs, 3)) for i in range(3)), 0],
    }
    if config.experts is not None:
        values["expert_shared_feed_forward_length"] = config.experts.shared_width
    return values


def divisors_of(config: DecoderConfig, architecture: str) -> Divisors:
    """Returns the divisors of the frequencies, by tensor name."""
    rope = _main_layer(config).rope
    if rope is None or not rope.divisors:
        return {}
    if architecture == "phi3":
        return {LONG: rope.long_divisors or rope.divisors, SHORT: rope.divisors}
    is_llama3 = architecture == "llama" and len(set(rope.divisors)) > 1
    return {FREQUENCIES: rope.divisors} if is_llama3 else {}


def check_gguf_config(config: DecoderConfig, context: int) -> str:
    """Returns a decoder's architecture; raises if llama.cpp's logits would differ.

    To find differences, this function computes the metadata values for the config, and
    converts them back to a config, as llama.cpp would read them.
    """
    architecture = nearest_architecture(config)
    names = set() if config.tie_embeddings else {"output.weight"}
    names |= {name for field, name in BIAS_TENSORS.items() if getattr(config, field)}
    values = values_of(config, architecture, context)
    divisors = divisors_of(config, architecture)
    computed, _ = config_from_values(
        architecture, values, names, config.vocab_size, divisors
    )
    # 1. Compare all fields but the layers.
    fields = [f.name for f in dataclasses.fields(config) if f.name != "layers"]
    differences = [
        f"`{name}`={getattr(config, name)!r}"
        for name in fields
        if _round(getattr(config, name)) != _round(getattr(computed, name))
    ]
    # 2. Compare the layers. A window that covers the whole context has no effect, and
    # llama.cpp ignores the windows of "phi3".
    windows, computed_windows = (
        [min(layer.window or context, context) for layer in c.layers]
        for c in (config, computed)
    )
    is_ignored = architecture == "phi3" and min(windows) < context
    if is_ignored or windows != computed_windows:
        differences += ["these sliding windows"]
    structures, computed_structures = (
        [layer.structure for layer in c.layers] for c in (config, computed)
    )
    if structures != computed_structures:
        differences += ["layers of these structures"]
    ropes, computed_ropes = (
        _round(tuple(layer.rope for layer in c.layers)) for c in (config, computed)
    )
    if ropes != computed_ropes:
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


def _warn_about_yarn(config: DecoderConfig) -> None:
    """Warns if frequencies change because llama.cpp rounds the bounds of YaRN's ramp.

    Between these bounds, YaRN blends stretched and original frequencies.
    """
    rope = _main_layer(config).rope or Rope()
    if not rope.original_length:
        return
    section = {"rope_type": "yarn", "factor": rope.divisors[-1], "truncate": True}
    section["original_max_position_embeddings"] = rope.original_length
    rotary_dim = config.rotary_dim
    computed = read_rope({}, rotary_dim, theta=rope.theta, section=section).divisors
    change = max(abs(a / b - 1) for a, b in zip(computed, rope.divisors, strict=True))
    if change > 1e-3:
        warnings.warn(
            "llama.cpp rounds the bounds of YaRN's ramp to whole pairs, which changes "
            f"frequencies of gpt-oss by up to {change:.1%}.",
            stacklevel=3,
        )


def _main_layer(config: DecoderConfig) -> LayerKind:
    """Returns a kind of layer, if possible with rotary positions and no window."""
    layers = config.layers
    return max(layers, key=lambda kind: (kind.rope is not None, kind.window is None))


def _round(x: object) -> object:
    """Rounds numbers to float32, as GGUF stores them; dataclasses become tuples."""
    if dataclasses.is_dataclass(x):
        fields = (field for field in dataclasses.fields(x) if field.compare)
        return _round(tuple(getattr(x, field.name) for field in fields))
    if isinstance(x, tuple):
        return tuple(map(_round, x))
    return float(np.float32(x)) if isinstance(x, float) else x
