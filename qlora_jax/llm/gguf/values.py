"""Converts a `DecoderConfig` to llama.cpp's metadata values and back."""

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ..models.config import DecoderConfig, Experts, LayerKind, Rope
from ..models.families import GPT_OSS_EXPERTS, MIXTRAL_EXPERTS
from ..models.family import is_count, number, read_rope

# Names of the tensors that contain `Rope.divisors` and `Rope.long_divisors`.
FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
OSS = "gpt-oss"
PERMUTED = ("llama", "smollm3")  # llama.cpp reorders the rows of their q and k
OFFSET_NORMS = ("gemma2", "gemma3")  # their norms are stored as 1 + scale
# The optional biases that llama.cpp reads, by architecture. They are fields of
# `DecoderConfig` that are true if a file contains their tensor in `_BIAS_TENSORS`.
_BIASES = {"llama": ("qkv_bias", "o_bias", "mlp_bias"), "qwen2": ("qkv_bias",)}
_BIAS_TENSORS = {
    "qkv_bias": "blk.0.attn_q.bias",
    "o_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}
# Other fields of `DecoderConfig` that are constant for an architecture.
_FIXED_FIELDS: dict[str, dict[str, Any]] = {
    OSS: {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "sinks": True}
    | {"activation": "clamped_swiglu", "tie_embeddings": False},
    "olmoe": {"qk_norms": "whole", "tie_embeddings": False},
}
# Required keys, by field of `DecoderConfig`, and by field of `Experts`.
_SIZE_KEYS = {
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
}
_EXPERT_KEYS = {"count": "expert_count", "per_token": "expert_used_count"}
# Other fields of `Experts`, by architecture.
_EXPERT_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3moe": {},
    OSS: GPT_OSS_EXPERTS,
    "llama": MIXTRAL_EXPERTS,
    "olmoe": {"normalized": False},
}
# Number of layers by which Gemma's 27B models are recognized. They scale scores by
# `(hidden_size // num_heads) ** -0.5`.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Every 2nd or 6th layer has no window, and every 4th layer of SmolLM3 has no rotary
# positions.
_WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, OSS: 2}
_NO_ROPE_PERIOD = 4
# Further YaRN keys, with the only values that are supported.
_YARN_KEYS = {"beta_fast": 32, "beta_slow": 1, "ext_factor": 1, "attn_factor": 1}

Values = Mapping[str, Any]  # metadata values by key, without the architecture's name
Factors = Mapping[str, tuple[float, ...]]  # divisors of frequencies by tensor name


def _size_keys(architecture: str) -> dict[str, str]:
    if architecture not in ("qwen3moe", OSS):
        return _SIZE_KEYS
    return _SIZE_KEYS | {"intermediate_size": "expert_feed_forward_length"}


def _is_mixture(architecture: str, values: Values) -> bool:
    # llama.cpp stores Mixtral as a "llama" with experts.
    has_experts = architecture != "llama" or bool(values.get("expert_count"))
    return architecture in _EXPERT_FIELDS and has_experts


def architecture_of(config: DecoderConfig) -> str:
    """Returns the llama.cpp architecture that is most similar to a decoder."""
    c = config
    if c.experts is not None:
        if c.sinks:
            return OSS
        if c.qk_norms == "whole":
            return "olmoe"
        return "qwen3moe" if c.qk_norms else "llama"
    if c.fused:
        return "phi3"
    if c.post_norms:
        return "gemma3" if c.qk_norms else "gemma2"
    if None in c.ropes:
        return "smollm3"
    if c.qk_norms:
        return "qwen3"
    return "qwen2" if c.qkv_bias and not (c.o_bias or c.mlp_bias) else "llama"


def config_from_values(
    architecture: str,
    values: Values,
    names: Collection[str],
    vocab_size: int,
    factors: Factors,
) -> DecoderConfig:
    """Returns the config of the decoder that llama.cpp builds from metadata values.

    `names` are the names of the file's tensors.
    """
    # 1. The sizes. Here and below, missing values get llama.cpp's defaults.
    get = values.get
    sizes = {name: values[key] for name, key in _size_keys(architecture).items()}
    width, heads = sizes["hidden_size"], sizes["num_heads"]
    head_dim = get("attention.key_length", width // heads)
    is_phi3, is_gemma = architecture == "phi3", architecture in OFFSET_NORMS
    rotary_dim = get("rope.dimension_count", head_dim) if is_phi3 else head_dim
    is_27b = sizes["num_layers"] == _LAYERS_OF_27B.get(architecture)
    scaled_dim = width // heads if is_27b else head_dim
    # 2. Soft-caps, experts and biases.
    attention_cap = logit_cap = None
    if architecture == "gemma2":
        attention_cap = number(get("attn_logit_softcapping", 50.0))
        logit_cap = number(get("final_logit_softcapping", 30.0))
    experts = None
    if _is_mixture(architecture, values):
        counts: Any = {name: get(key) for name, key in _EXPERT_KEYS.items()}
        experts = Experts(**counts, **_EXPERT_FIELDS[architecture])
    bias_fields = _BIASES.get(architecture, ())
    biases: Any = {name: _BIAS_TENSORS[name] in names for name in bias_fields}
    # 3. The layers, and the other fields.
    ropes = _read_ropes(architecture, values, rotary_dim, factors)
    fields = dict(
        sizes,
        vocab_size=vocab_size,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        layers=_read_layers(architecture, values, sizes["num_layers"], ropes),
        rotary_dim=rotary_dim,
        rms_norm_eps=number(get("attention.layer_norm_rms_epsilon", 1e-5)),
        unit_offset_norms=is_gemma,
        post_norms=is_gemma,
        qk_norms=architecture in ("qwen3", "gemma3", "qwen3moe"),
        activation="gelu_pytorch_tanh" if is_gemma else "silu",
        fused=is_phi3,
        embedding_scale=width**0.5 if is_gemma else 1.0,
        attention_scale=scaled_dim**-0.5,
        attention_soft_cap=attention_cap,
        logit_soft_cap=logit_cap,
        tie_embeddings=architecture == "gemma2" or "output.weight" not in names,
        experts=experts,
    )
    return DecoderConfig(**fields | biases | _FIXED_FIELDS.get(architecture, {}))


def check_values(architecture: str, values: Values, names: Collection[str]) -> None:
    """Raises a ValueError for missing values and values that are not supported."""
    # 1. Required keys, and counts among optional keys.
    get = values.get
    required = [*_size_keys(architecture).values()]
    required += _EXPERT_KEYS.values() if _is_mixture(architecture, values) else ()
    optional = ["attention.head_count_kv", "attention.key_length"]
    optional += ["rope.dimension_count"]
    if architecture in _WINDOW_PERIODS:
        optional += ["attention.sliding_window", "attention.sliding_window_pattern"]
    missing = [key for key in required if not is_count(get(key))]
    missing += [key for key in optional if not is_count(get(key, 1))]
    if architecture in ("gemma3", OSS) and "attention.sliding_window" not in values:
        missing += ["attention.sliding_window"]
    missing = [f"{architecture}.{key}" for key in missing]
    # Each layer has at least one tensor, so a count above the number of tensors is an
    # error in the file. With it, later code would use up all memory.
    if not is_count(get("block_count"), len(names)):
        missing = [f"{architecture}.block_count of at most {len(names)}"]
    if "token_embd.weight" not in names:
        missing += ["token_embd.weight"]
    if missing:
        raise ValueError(f"a GGUF model must have {', '.join(missing)}.")
    # 2. Keys with few supported values; others would change the model silently.
    default_dim = values["embedding_length"] // values["attention.head_count"]
    head_dim = get("attention.key_length", default_dim)
    supported = {
        "rope.scaling.type": ("none", "linear"),
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "expert_weights_scale": (1, 0),
    }
    if architecture != "phi3":
        supported["rope.dimension_count"] = (head_dim,)
        supported["rope.scaling.attn_factor"] = (1,)
    if architecture not in ("phi3", *_WINDOW_PERIODS):
        supported["attention.sliding_window"] = (0,)
    if architecture == "gemma3":
        supported["final_logit_softcapping"] = (0,)
    if architecture == OSS:
        supported["rope.scaling.type"] += ("yarn",)
        supported["rope.freq_base_swa"] = (get("rope.freq_base"),)
        supported |= {f"rope.scaling.yarn_{key}": (x,) for key, x in _YARN_KEYS.items()}
    if wrong := [
        f"`{architecture}.{key}` must be {' or '.join(map(repr, allowed))}. "
        f"Got {value!r}."
        for key, allowed in supported.items()
        if (value := get(key, allowed[0])) not in allowed
    ]:
        raise ValueError(" ".join(wrong))


def values_of(config: DecoderConfig, architecture: str, context: int) -> dict[str, Any]:
    """Returns the metadata values of a config for an architecture."""
    # 1. The values that all architectures have.
    c, main_layer = config, _main_layer(config)
    rope = main_layer.rope or Rope()
    windows = [layer.window for layer in c.layers if layer.window is not None]
    values = {
        "context_length": context,
        "vocab_size": c.vocab_size,
        **{key: getattr(c, name) for name, key in _size_keys(architecture).items()},
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(rope.theta),
    }
    # 2. Experts, windows and soft-caps. gpt-oss must have a window.
    if c.experts is not None:
        values |= {key: getattr(c.experts, name) for name, key in _EXPERT_KEYS.items()}
    if architecture in _WINDOW_PERIODS and (windows or architecture == OSS):
        values["attention.sliding_window"] = [*windows, context][0]
    if architecture == "gemma2":
        caps = {"attn": c.attention_soft_cap, "final": c.logit_soft_cap}
        for name, cap in caps.items():
            if cap is not None:
                values[f"{name}_logit_softcapping"] = float(cap)
    # 3. Stretched rotary positions; see also `factors_of`.
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


def factors_of(config: DecoderConfig, architecture: str) -> Factors:
    """Returns the divisors of the frequencies, by tensor name."""
    rope = _main_layer(config).rope
    if rope is None or not rope.divisors:
        return {}
    if architecture == "phi3":
        return {LONG: rope.long_divisors or rope.divisors, SHORT: rope.divisors}
    is_llama3 = architecture == "llama" and len(set(rope.divisors)) > 1
    return {FREQUENCIES: rope.divisors} if is_llama3 else {}


def gguf_architecture(config: DecoderConfig, context: int) -> str:
    """Returns a decoder's architecture; raises if llama.cpp's logits would differ.

    To find differences, this function computes the metadata values for the config, and
    converts them back to a config, as llama.cpp would read them.
    """
    architecture = architecture_of(config)
    names = set() if config.tie_embeddings else {"output.weight"}
    names |= {name for field, name in _BIAS_TENSORS.items() if getattr(config, field)}
    values = values_of(config, architecture, context)
    factors = factors_of(config, architecture)
    computed = config_from_values(
        architecture, values, names, config.vocab_size, factors
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
    ropes, computed_ropes = (
        _round(tuple(layer.rope for layer in c.layers)) for c in (config, computed)
    )
    if ropes != computed_ropes:
        differences += ["these rotary positions"]
    # 3. Some architectures require `num_heads * head_dim == hidden_size`.
    heads = {config.num_heads}
    heads |= {config.num_kv_heads} if architecture == "olmoe" else set()
    is_wide = {n * config.head_dim for n in heads} == {config.hidden_size}
    if architecture in ("phi3", "olmoe") and not is_wide:
        differences += ["heads whose total width is not `hidden_size`"]
    if differences:
        raise ValueError(
            "a model in GGUF must be one that llama.cpp supports. As "
            f'"{architecture}" it does not support {", ".join(differences)}.'
        )
    if architecture == OSS:
        _warn_about_yarn(config)
    return architecture


def _read_ropes(
    architecture: str, values: Values, rotary_dim: int, factors: Factors
) -> tuple[Rope, Rope]:
    """Returns the rotary positions of layers without a window, and of the others."""
    get = values.get
    theta = number(get("rope.freq_base", 10_000.0))
    factor = number(get("rope.scaling.factor", get("rope.scale_linear", 0.0))) or 1.0
    if get("rope.scaling.type") == "none":
        factor = 1.0
    original = get("rope.scaling.original_context_length", get("context_length"))
    if architecture == "phi3":
        short, long = (factors.get(name, ()) for name in (SHORT, LONG))
        scale = number(get("rope.scaling.attn_factor", 1.0))
        full = Rope(theta, short, long, int(original) if long else 0, scale)
    elif get("rope.scaling.type") == "yarn":
        full = _gpt_oss_rope(theta, rotary_dim, factor, original)
    else:
        divisors = factors.get(FREQUENCIES, ())
        if factor != 1:
            divisors = divisors or (1.0,) * (rotary_dim // 2)
            divisors = tuple(factor * divisor for divisor in divisors)
        full = Rope(theta, divisors)
    if architecture != "gemma3":
        return full, full
    return full, Rope(number(get("rope.freq_base_swa", 10_000.0)))


def _gpt_oss_rope(
    theta: float, dim: int, factor: float, original: int, *, truncate: bool = False
) -> Rope:
    """Returns gpt-oss's rotary positions; llama.cpp computes them with `truncate`."""
    section = {"rope_type": "yarn", "factor": factor, "truncate": truncate}
    section["original_max_position_embeddings"] = original
    return read_rope({}, dim, theta=theta, section=section)


def _warn_about_yarn(config: DecoderConfig) -> None:
    """Warns if frequencies change because llama.cpp rounds the bounds of the ramp."""
    rope = _main_layer(config).rope or Rope()
    if not rope.original_length:
        return
    settings = rope.theta, config.rotary_dim, rope.divisors[-1], rope.original_length
    computed = _gpt_oss_rope(*settings, truncate=True).divisors
    change = max(abs(a / b - 1) for a, b in zip(computed, rope.divisors, strict=True))
    if change > 1e-3:
        warnings.warn(
            "llama.cpp rounds the bounds of YaRN's ramp to whole pairs, which changes "
            f"frequencies of gpt-oss by up to {change:.1%}.",
            stacklevel=3,
        )


def _read_layers(
    architecture: str, values: Values, count: int, ropes: tuple[Rope, Rope]
) -> tuple[LayerKind, ...]:
    full, local = ropes
    if architecture == "smollm3":
        has_rope = (bool((i + 1) % _NO_ROPE_PERIOD) for i in range(count))
        return tuple(LayerKind(full if is_rotary else None) for is_rotary in has_rope)
    if architecture in _WINDOW_PERIODS:
        default = _WINDOW_PERIODS[architecture]
        period = values.get("attention.sliding_window_pattern", default)
        window = values.get("attention.sliding_window", 4096)
        kinds = LayerKind(local, window), LayerKind(full)
        return tuple(kinds[i % period == period - 1] for i in range(count))
    window = values.get("attention.sliding_window") if architecture == "phi3" else None
    return (LayerKind(full, window or None),) * count


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
