"""The metadata of a decoder in a GGUF file: numbers from which llama.cpp builds it."""

from collections.abc import Mapping
from typing import Any

from ..models.config import DecoderConfig, LayerKind, Rope

OSS = "gpt-oss"
QWEN3_5 = ("qwen35", "qwen35moe")
# Architectures with windows: the last layer of each such period has none.
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, OSS: 2}
# The tensors with `Rope.divisors`, and those for short and for long sequences.
FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"

Divisors = Mapping[str, tuple[float, ...]]  # of frequencies, by tensor name


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
    c, layer = config, main_layer(config)
    rope = layer.rope or Rope()
    windows = [layer.window for layer in c.layers if layer.window is not None]
    has_expert_key = architecture in ("qwen3moe", "qwen35moe", OSS)
    values = {
        "context_length": context,
        "vocab_size": c.vocab_size,
        "block_count": c.num_layers,
        "embedding_length": c.hidden_size,
        f"{'expert_' * has_expert_key}feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(rope.theta),
    }
    # 2. Experts, windows and soft-caps. gpt-oss must have the key for a
    # window. Without a window, its value is the context length.
    if c.experts is not None:
        values["expert_count"] = c.experts.count
        values["expert_used_count"] = c.experts.per_token
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
        values["attention.sliding_window"] = layer.window or 0
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
    rope = main_layer(config).rope
    if rope is None or not rope.divisors:
        return {}
    if architecture == "phi3":
        return {LONG: rope.long_divisors or rope.divisors, SHORT: rope.divisors}
    is_llama3 = architecture == "llama" and len(set(rope.divisors)) > 1
    return {FREQUENCIES: rope.divisors} if is_llama3 else {}


def main_layer(config: DecoderConfig) -> LayerKind:
    """Returns a kind of layer, if possible with rotary positions and no window."""
    layers = config.layers
    return max(layers, key=lambda kind: (kind.rope is not None, kind.window is None))
