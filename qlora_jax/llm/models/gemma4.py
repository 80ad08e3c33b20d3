"""Reads the configs of Gemma 4."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .config import DecoderConfig, Experts, Heads, LayerKind, Rope
from .family import (
    WINDOW_KEYS,
    is_count,
    read_biases,
    read_count,
    read_flag,
    read_layer_types,
    read_number,
    read_optional,
    read_positive,
    read_rope,
    read_section,
    read_size,
    require_if_present,
    shared_fields,
)

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6},
}
_ROPES[_FULL] |= {"partial_rotary_factor": 0.25}
_DIRECTIONS = (None, "vision")
# These keys must be missing or null, because `rope_parameters` has their values for
# each type of layer.
_NULL_KEYS = ("rope_scaling", "rope_theta", "partial_rotary_factor")
_NULL_KEYS += ("original_max_position_embeddings",)
GEMMA4_KEYS = f"""
attention_bias attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim
hidden_activation hidden_size_per_layer_input moe_intermediate_size num_experts
num_global_key_value_heads num_kv_shared_layers top_k_experts
use_bidirectional_attention use_double_wide_mlp vocab_size_per_layer_input {WINDOW_KEYS}
"""


def read_gemma4(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of the text half of a model with a vision tower."""
    return _read(raw, window=512, per_layer_width=256)


def read_gemma4_unified(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of the text half of a model without a vision tower (12B)."""
    require_if_present(
        raw, {"hidden_size_per_layer_input": 0, "enable_moe_block": False}
    )
    return _read(raw, window=1024, per_layer_width=0)


def _read(
    raw: Mapping[str, Any], *, window: int, per_layer_width: int
) -> DecoderConfig:
    """Reads a config; the keyword arguments are defaults for missing keys."""
    require_if_present(raw, dict.fromkeys(_NULL_KEYS))
    # "vision" only changes the attention between the tokens of images.
    if (bidirectional := raw.get("use_bidirectional_attention")) not in _DIRECTIONS:
        raise ValueError(
            '`use_bidirectional_attention` must be null or "vision". Got '
            f"{bidirectional!r}."
        )
    gelu = ("hidden_activation", "gelu_pytorch_tanh")
    sizes = {"head_dim": 256, "kv_heads": 4, "tied": True, "activation": gelu}
    # `shared_fields` rejects `per_layer_config`, which `_read_heads` reads.
    fields = shared_fields({**raw, "per_layer_config": None}, **sizes)
    # 1. The windows. The rotary positions are set in step 3.
    types = _read_types(raw)
    if _SLIDING in types:
        window = read_count(raw, "sliding_window", window)
    kinds = [LayerKind(window=window if x == _SLIDING else None) for x in types]
    # 2. In E2B and E4B, each layer has an additional input (see `per_layer_input.py`),
    # and the last layers use the keys and values of earlier layers.
    width = raw.get("hidden_size_per_layer_input", per_layer_width)
    if width and not is_count(width):
        raise ValueError(
            "`hidden_size_per_layer_input` must be a positive integer, 0 or null. Got "
            f"{width!r}."
        )
    if width and raw.get("vocab_size_per_layer_input", 262_144) != raw["vocab_size"]:
        raise ValueError(
            "`vocab_size_per_layer_input` must be `vocab_size`. Got "
            f"{raw.get('vocab_size_per_layer_input')} and {raw['vocab_size']}."
        )
    kinds = _share_kv(raw, kinds, types)
    # 3. The heads, and the rotary positions, which depend on the size of heads.
    heads = _read_heads(raw, types, Heads(fields["num_kv_heads"], fields["head_dim"]))
    ropes = {
        layer_type: _read_rope(raw, layer_type, layer_heads.head_dim)
        for layer_type, layer_heads in dict(zip(types, heads, strict=True)).items()
    }
    return DecoderConfig(
        **fields,
        **read_biases(raw),
        layers=tuple(
            replace(kind, rope=ropes[layer_type], heads=layer_heads)
            for kind, layer_type, layer_heads in zip(kinds, types, heads, strict=True)
        ),
        post_norms=True,
        qk_norms=True,
        value_norms=True,
        output_scalars=True,
        per_layer_width=width or 0,
        embedding_scale=fields["hidden_size"] ** 0.5,
        attention_scale=1.0,
        logit_soft_cap=read_optional(raw, "final_logit_softcapping"),
        experts=_read_experts(raw) if read_flag(raw, "enable_moe_block") else None,
    )


def _read_experts(raw: Mapping[str, Any]) -> Experts:
    """Returns the experts that each layer has in addition to its MLP (26B-A4B)."""
    return Experts(
        read_count(raw, "num_experts"),
        read_count(raw, "top_k_experts"),
        width=read_count(raw, "moe_intermediate_size"),
        joined="halves",
        beside_mlp=True,
    )


def _read_types(raw: Mapping[str, Any]) -> list[str]:
    """Returns the types of layers; the last layer always has full attention."""
    types = read_layer_types(
        raw, (_SLIDING, _FULL), lambda i: _SLIDING if (i + 1) % 6 else _FULL
    )
    return [*types[:-1], _FULL]


def _share_kv(
    raw: Mapping[str, Any], kinds: Sequence[LayerKind], types: Sequence[str]
) -> list[LayerKind]:
    """Returns the layers, of which the last ones have no keys and values.

    These `num_kv_shared_layers` layers use the keys and values of an earlier layer of
    the same type. Their MLPs may be twice as wide.
    """
    num_shared = read_size(raw, "num_kv_shared_layers", 0)
    if not num_shared:
        return [*kinds]
    first = len(types) - num_shared
    if first < 1 or {*types[:first]} != {*types}:
        raise ValueError(
            "`num_kv_shared_layers` must leave a layer of each type with keys and "
            f"values. Got {num_shared}."
        )
    is_wide = read_flag(raw, "use_double_wide_mlp")
    wide = 2 * raw["intermediate_size"] if is_wide else None
    shared = {"has_kv": False, "mlp_width": wide}
    return [
        replace(kind, kv_group=layer_type, **(shared if i >= first else {}))
        for i, (kind, layer_type) in enumerate(zip(kinds, types, strict=True))
    ]


def _read_heads(
    raw: Mapping[str, Any], types: Sequence[str], default: Heads
) -> list[Heads]:
    has_shared_projection = read_flag(raw, "attention_k_eq_v")
    if "per_layer_config" in raw:  # transformers 5 writes it, with keys such as "05"
        by_number = read_section(raw, "per_layer_config")
        overrides = {int(layer): values for layer, values in by_number.items()}
    else:
        full = {"head_dim": raw.get("global_head_dim", 512)}
        num_kv_heads = raw.get("num_global_key_value_heads")
        if has_shared_projection and num_kv_heads is not None:
            full["num_key_value_heads"] = num_kv_heads
        overrides = {i: full for i, x in enumerate(types) if x == _FULL}
    keys = {*itertools.chain(*overrides.values())}
    if unknown := sorted(keys - {"head_dim", "num_key_value_heads"}):
        raise ValueError(
            "`per_layer_config` must have only `head_dim` and `num_key_value_heads`. "
            f"Got {unknown}."
        )
    heads = []
    for i, layer_type in enumerate(types):
        values = overrides.get(i, {})
        num_kv_heads = values.get("num_key_value_heads", default.num_kv_heads)
        head_dim = values.get("head_dim", default.head_dim)
        is_full = layer_type == _FULL
        heads.append(Heads(num_kv_heads, head_dim, is_full and has_shared_projection))
    # More pairs than types mean that a type has heads of several sizes.
    if len({*zip(types, heads, strict=True)}) > len({*types}):
        raise ValueError(
            "`per_layer_config` must be the same for all layers of a type in "
            f"`layer_types`. Got {overrides}."
        )
    return heads


def _read_rope(raw: Mapping[str, Any], layer_type: str, dim: int) -> Rope | None:
    """Reads the rotary positions of the layers of a type, with heads of size `dim`."""
    sections = read_section(raw, "rope_parameters")
    if raw.get("rope_parameters") is None:
        sections = _ROPES
    section = sections.get(layer_type)
    if not isinstance(section, Mapping) or "rope_theta" not in section:
        raise ValueError(
            f"`rope_parameters` must have a `rope_theta` for {layer_type!r}. Got "
            f"{sections}."
        )
    if section.get("rope_type") != "proportional":
        return replace(read_rope(raw, dim, section=section), dim=dim)
    # Only the first pairs are rotated. Each has the frequency that it would have if all
    # pairs were rotated.
    num_pairs = int(read_number(section, "partial_rotary_factor", 1.0) * dim // 2)
    if num_pairs == 0:
        return None
    factor = read_positive(section, "factor", 1.0)
    divisors = () if factor == 1 else (factor,) * (dim // 2)
    is_partial = num_pairs < dim // 2
    theta = read_number(section, "rope_theta")
    return Rope(theta, divisors, dim=dim, num_pairs=num_pairs if is_partial else 0)
