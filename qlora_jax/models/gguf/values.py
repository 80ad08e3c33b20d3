"""Converts a `DecoderConfig` to llama.cpp's values and back."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ..config import DecoderConfig, Experts, LayerKind, Rope
from ..families import gpt_oss, llama
from ..families.family import is_count, number
from ..families.ropes import read_rope

# Tensors of the divisors of frequencies, for the fields of `Rope`.
FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# The biases that llama.cpp reads, by architecture.
_BIASES = {"llama": ("qkv_bias", "o_bias", "mlp_bias"), "qwen2": ("qkv_bias",)}
_BIAS_TENSORS = {
    "qkv_bias": "blk.0.attn_q.bias",
    "o_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}
OSS = "gpt-oss"
# Other fields that an architecture always has.
_PARTS: dict[str, dict[str, Any]] = {
    OSS: {name: True for name in ("qkv_bias", "o_bias", "mlp_bias", "sinks")}
    | {"activation": gpt_oss.ACTIVATION, "tie_embeddings": False},
    "olmoe": {"qk_norms": "whole", "tie_embeddings": False},
}
_SIZES = {  # keys of the sizes that a file must say, by field
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
}
# Names of experts, by architecture.
_EXPERTS: dict[str, dict[str, Any]] = {"qwen3moe": {}, OSS: gpt_oss.NAMES}
_EXPERTS |= {"llama": llama.NAMES, "olmoe": {"normalized": False}}
_OF_EXPERTS = {"count": "expert_count", "per_token": "expert_used_count"}
_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, which scales by its width
_PERIODS = {"gemma2": 2, "gemma3": 6, OSS: 2}  # each 2nd or 6th layer has no window
_NO_ROPE = 4  # each 4th layer of SmolLM3 has no rotary positions
_YARN_KEYS = {"beta_fast": 32, "beta_slow": 1, "ext_factor": 1, "attn_factor": 1}
PERMUTED = ("llama", "smollm3")  # their rows of q and k are in another order
OFFSET_NORMS = ("gemma2", "gemma3")  # their norms are stored as 1 + scale


def _sizes(kind: str) -> dict[str, str]:
    """Returns the keys of the sizes that a file must say, by field."""
    own = {"intermediate_size": "expert_feed_forward_length"}
    return _SIZES | own if kind in ("qwen3moe", OSS) else _SIZES


def _is_mixture(kind: str, get: Callable[..., Any]) -> bool:
    return kind in _EXPERTS and (kind != "llama" or bool(get("expert_count")))


def architecture_of(config: DecoderConfig) -> str:
    """Returns the architecture of llama.cpp that is most like a decoder."""
    c = config
    if c.experts is not None:
        if c.sinks:
            return OSS
        if c.qk_norms == "whole":
            return "olmoe"
        return "qwen3moe" if c.qk_norms else "llama"  # as which it has Mixtral
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
    kind: str,
    values: Mapping[str, Any],
    names: Collection[str],
    vocab_size: int,
    factors: Mapping[str, tuple[float, ...]],
) -> DecoderConfig:
    """Returns the decoder that llama.cpp computes from an architecture's values."""
    get, sizes = values.get, {name: values[key] for name, key in _sizes(kind).items()}
    count, width, heads = (sizes[x] for x in ("num_layers", "hidden_size", "num_heads"))
    head_dim = get("attention.key_length", width // heads)
    is_gemma = kind in OFFSET_NORMS
    size = width // heads if count == _BY_WIDTH.get(kind) else head_dim
    turning = get("rope.dimension_count", head_dim) if kind == "phi3" else head_dim
    caps = ("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)
    attention_cap, logit_cap = (
        number(get(*cap)) if kind == "gemma2" else None for cap in caps
    )
    biases: dict[str, Any] = {
        name: _BIAS_TENSORS[name] in names for name in _BIASES.get(kind, ())
    }
    own: dict[str, Any] = {name: get(key) for name, key in _OF_EXPERTS.items()}
    fields = dict(
        sizes,
        vocab_size=vocab_size,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        layers=_layers(kind, get, count, _ropes(kind, get, turning, factors)),
        rotary_dim=turning,
        rms_norm_eps=number(get("attention.layer_norm_rms_epsilon", 1e-5)),
        unit_offset_norms=is_gemma,
        post_norms=is_gemma,
        qk_norms=kind in ("qwen3", "gemma3", "qwen3moe"),
        activation="gelu_pytorch_tanh" if is_gemma else "silu",
        fused=kind == "phi3",
        embedding_scale=width**0.5 if is_gemma else 1.0,
        attention_scale=size**-0.5,
        attention_soft_cap=attention_cap,
        logit_soft_cap=logit_cap,
        tie_embeddings=kind == "gemma2" or "output.weight" not in names,
        experts=Experts(**own, **_EXPERTS[kind]) if _is_mixture(kind, get) else None,
        **biases,
    )
    return DecoderConfig(**fields | _PARTS.get(kind, {}))


def check_values(kind: str, values: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuses missing values, and those of models that `Decoder` does not compute."""
    get = values.get
    needed = [*_sizes(kind).values()]
    needed += _OF_EXPERTS.values() if _is_mixture(kind, get) else ()
    missing = [f"{kind}.{key}" for key in needed if not is_count(get(key))]
    optional = ["attention.head_count_kv", "attention.key_length"]
    optional += ["rope.dimension_count"]
    if kind in _PERIODS:
        optional += ["attention.sliding_window", "attention.sliding_window_pattern"]
    missing += [f"{kind}.{key}" for key in optional if not is_count(get(key, 1))]
    if kind in ("gemma3", OSS) and "attention.sliding_window" not in values:
        missing += [f"{kind}.attention.sliding_window"]
    if not is_count(get("block_count"), len(names)):
        missing = [f"{kind}.block_count of at most {len(names)}"]
    if "token_embd.weight" not in names:
        missing += ["token_embd.weight"]
    if missing:
        raise ValueError(f"a GGUF model must have {', '.join(missing)}.")
    own_size = values["embedding_length"] // values["attention.head_count"]
    head_dim = get("attention.key_length", own_size)
    supported = {  # values of a key; others would change the model silently
        "rope.scaling.type": ("none", "linear"),
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "expert_weights_scale": (1, 0),
    }
    if kind != "phi3":
        supported["rope.dimension_count"] = (head_dim,)
        supported["rope.scaling.attn_factor"] = (1,)
    if kind not in ("phi3", *_PERIODS):
        supported["attention.sliding_window"] = (0,)
    if kind == "gemma3":
        supported["final_logit_softcapping"] = (0,)
    if kind == OSS:
        supported["rope.scaling.type"] += ("yarn",)
        supported["rope.freq_base_swa"] = (get("rope.freq_base"),)
        supported |= {f"rope.scaling.yarn_{key}": (x,) for key, x in _YARN_KEYS.items()}
    if wrong := [
        f"`{kind}.{key}` must be {' or '.join(map(repr, allowed))}. Got {value!r}."
        for key, allowed in supported.items()
        if (value := get(key, allowed[0])) not in allowed
    ]:
        raise ValueError(" ".join(wrong))


def values_of(config: DecoderConfig, kind: str, context: int) -> dict[str, Any]:
    """Returns the values of a config that the architecture has keys for."""
    c = config
    full, rope = _full(c), _full(c).rope or Rope()
    windows = [layer.window for layer in c.layers if layer.window is not None]
    values = {
        "context_length": context,
        "vocab_size": c.vocab_size,
        **{key: getattr(c, name) for name, key in _sizes(kind).items()},
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.rotary_dim,
        "rope.freq_base": float(rope.theta),
    }
    if c.experts is not None:
        values |= {key: getattr(c.experts, x) for x, key in _OF_EXPERTS.items()}
    if kind in _PERIODS and (windows or kind == OSS):  # which must say one
        values["attention.sliding_window"] = [*windows, context][0]
    if kind == "gemma2":
        caps = {"attn": c.attention_soft_cap, "final": c.logit_soft_cap}
        given = {k: float(cap) for k, cap in caps.items() if cap is not None}
        values |= {f"{k}_logit_softcapping": cap for k, cap in given.items()}
    if kind == "phi3":
        values["attention.sliding_window"] = full.window or 0
        values["rope.scaling.original_context_length"] = rope.original_length or context
        values["rope.scaling.attn_factor"] = float(rope.scale)
    elif kind == OSS and rope.original_length:
        values["rope.scaling.type"] = "yarn"
        values["rope.scaling.factor"] = float(rope.divisors[-1])
        values["rope.scaling.original_context_length"] = rope.original_length
    elif rope.divisors and not _differ(rope):
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(rope.divisors[0])
    return values


def factors_of(config: DecoderConfig, kind: str) -> dict[str, tuple[float, ...]]:
    """Returns the divisors of the frequencies, by tensor name."""
    rope = _full(config).rope
    if rope is None or not rope.divisors:
        return {}
    if kind == "phi3":
        return {LONG: rope.long_divisors or rope.divisors, SHORT: rope.divisors}
    return {FREQUENCIES: rope.divisors} if kind == "llama" and _differ(rope) else {}


def gguf_architecture(config: DecoderConfig, context: int) -> str:
    """Returns the architecture of a decoder, if llama.cpp computes the same."""
    kind = architecture_of(config)
    names = set() if config.tie_embeddings else {"output.weight"}
    names |= {name for key, name in _BIAS_TENSORS.items() if getattr(config, key)}
    computed = config_from_values(
        kind,
        values_of(config, kind, context),
        names,
        config.vocab_size,
        factors_of(config, kind),
    )
    fields = [f.name for f in dataclasses.fields(config) if f.name != "layers"]
    wrong = [
        f"`{name}`={getattr(config, name)!r}"
        for name in fields
        if _rounded(getattr(config, name)) != _rounded(getattr(computed, name))
    ]
    # A window that holds all of the context is none.
    cut = lambda window: None if window is None or window >= context else window
    windows = lambda c: [cut(layer.window) for layer in c.layers]
    ropes = lambda c: _rounded(tuple(layer.rope for layer in c.layers))
    narrow = kind == "phi3" and any(windows(config))  # llama.cpp leaves it out
    if narrow or windows(config) != windows(computed):
        wrong += ["these sliding windows"]
    if ropes(config) != ropes(computed):
        wrong += ["these rotary positions"]
    heads = {config.num_heads} | ({config.num_kv_heads} if kind == "olmoe" else set())
    is_wide = {n * config.head_dim for n in heads} == {config.hidden_size}
    if kind in ("phi3", "olmoe") and not is_wide:
        wrong += ["heads that are not as wide as the model together"]
    if wrong:
        raise ValueError(
            "a model in GGUF must be one that llama.cpp computes. As "
            f'"{kind}" it does not compute {", ".join(wrong)}.'
        )
    if kind == OSS:
        _warn_of_yarn(config)
    return kind


def _ropes(
    kind: str, get: Callable[..., Any], turning: int, factors: Mapping
) -> tuple[Rope, Rope]:
    """Returns the rotary positions of layers without and with a window."""
    theta = number(get("rope.freq_base", 10_000.0))
    factor = number(get("rope.scaling.factor", get("rope.scale_linear", 0.0))) or 1.0
    if get("rope.scaling.type") == "none":
        factor = 1.0
    original = get("rope.scaling.original_context_length", get("context_length"))
    if kind == "phi3":
        short, long = (factors.get(name, ()) for name in (SHORT, LONG))
        scale = number(get("rope.scaling.attn_factor", 1.0))
        full = Rope(theta, short, long, int(original) if long else 0, scale)
    elif get("rope.scaling.type") == "yarn":
        full = _yarn(theta, turning, factor, original)
    else:
        divisors = factors.get(FREQUENCIES, ())
        if factor != 1:
            divisors = tuple(factor * d for d in divisors or (1.0,) * (turning // 2))
        full = Rope(theta, divisors)
    is_other = kind == "gemma3"
    local = Rope(number(get("rope.freq_base_swa", 10_000.0))) if is_other else full
    return full, local


def _yarn(
    theta: float, dim: int, factor: float, original: int, *, truncate: bool = False
) -> Rope:
    """Returns gpt-oss's rotary positions; truncated, those that llama.cpp computes."""
    section = {"rope_type": "yarn", "factor": factor, "truncate": truncate}
    section["original_max_position_embeddings"] = original
    return read_rope({}, dim, theta=theta, section=section)


def _warn_of_yarn(config: DecoderConfig) -> None:
    """Warns if llama.cpp, which rounds the bounds of YaRN's ramp, computes another."""
    rope = _full(config).rope or Rope()
    if not rope.original_length:
        return
    own = rope.theta, config.rotary_dim, rope.divisors[-1], rope.original_length
    computed = _yarn(*own, truncate=True).divisors
    share = max(abs(a / b - 1) for a, b in zip(computed, rope.divisors, strict=True))
    if share > 1e-3:
        warnings.warn(
            "llama.cpp rounds the bounds of YaRN's ramp to whole pairs, which changes "
            f"frequencies of gpt-oss by up to {share:.1%}.",
            stacklevel=3,
        )


def _layers(
    kind: str, get: Callable[..., Any], count: int, ropes: tuple[Rope, Rope]
) -> tuple[LayerKind, ...]:
    full, local = ropes
    if kind == "smollm3":
        turns = (bool((i + 1) % _NO_ROPE) for i in range(count))
        return tuple(LayerKind(full if turn else None) for turn in turns)
    if kind in _PERIODS:
        period = get("attention.sliding_window_pattern", _PERIODS[kind])
        window = get("attention.sliding_window", 4096)
        kinds = LayerKind(local, window), LayerKind(full)
        return tuple(kinds[i % period == period - 1] for i in range(count))
    window = get("attention.sliding_window", 0) if kind == "phi3" else 0
    return (LayerKind(full, window or None),) * count


def _full(config: DecoderConfig) -> LayerKind:
    """Returns a layer with rotary positions that sees farthest."""
    best = lambda layer: (layer.rope is not None, layer.window is None)
    return max(config.layers, key=best)


def _differ(rope: Rope) -> bool:
    return len(set(rope.divisors)) > 1


def _rounded(x: Any) -> Any:
    """Rounds numbers to float32, as GGUF stores them."""
    if dataclasses.is_dataclass(x):
        fields = (field for field in dataclasses.fields(x) if field.compare)
        return _rounded(tuple(getattr(x, field.name) for field in fields))
    if isinstance(x, tuple):
        return tuple(map(_rounded, x))
    return float(np.float32(x)) if isinstance(x, float) else x
