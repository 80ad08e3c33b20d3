"""Reads the configs of Gemma 4."""

from dataclasses import replace
from typing import Any

from .config import DecoderConfig, Experts, Heads, LayerKind, Rope
from .rope import is_number, read_rope

_SLIDING, _FULL = "sliding_attention", "full_attention"
_GELU = "gelu_pytorch_tanh"


def read_gemma4(c: Any) -> DecoderConfig:
    """Returns the decoder that a config object of transformers describes."""
    # "vision" only changes the attention between the tokens of images.
    if c.use_bidirectional_attention not in (None, "vision"):
        raise ValueError(
            '`use_bidirectional_attention` must be null or "vision". Got '
            f"{c.use_bidirectional_attention!r}."
        )
    if c.hidden_activation != _GELU:
        raise ValueError(
            f'`hidden_activation` must be "{_GELU}". Got {c.hidden_activation!r}.'
        )
    # In E2B and E4B, each layer has an additional input (see `per_layer_input.py`).
    width = getattr(c, "hidden_size_per_layer_input", 0)
    if width and c.vocab_size_per_layer_input != c.vocab_size:
        raise ValueError(
            "`vocab_size_per_layer_input` must be `vocab_size`. Got "
            f"{c.vocab_size_per_layer_input} and {c.vocab_size}."
        )
    heads, layers, values = _read_heads(c), _read_layers(c), c.to_dict()
    return DecoderConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        # As attributes, these belong to a layer.
        num_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        layers=tuple(
            replace(kind, rope=_read_rope(c, layer_type, size.head_dim), heads=size)
            for kind, layer_type, size in zip(layers, c.layer_types, heads, strict=True)
        ),
        rms_norm_eps=c.rms_norm_eps,
        tie_embeddings=c.tie_word_embeddings,
        qkv_bias=c.attention_bias,
        o_bias=c.attention_bias,
        activation=_GELU,
        post_norms=True,
        qk_norms=True,
        value_norms=True,
        output_scalars=True,
        per_layer_width=width,
        embedding_scale=c.hidden_size**0.5,
        attention_scale=1.0,
        logit_soft_cap=c.final_logit_softcapping,
        experts=_read_experts(c) if getattr(c, "enable_moe_block", False) else None,
    )


def _read_experts(c: Any) -> Experts:
    """Returns the experts that each layer has in addition to its MLP (26B-A4B)."""
    return Experts(
        c.num_experts,
        c.top_k_experts,
        width=c.moe_intermediate_size,
        joined="halves",
        beside_mlp=True,
    )


def _read_layers(c: Any) -> list[LayerKind]:
    """Returns the layers without their rotary positions and heads.

    The last `num_kv_shared_layers` layers use the keys and values of an earlier layer
    of the same type. Their MLPs may be twice as wide.
    """
    types, num_shared = c.layer_types, c.num_kv_shared_layers
    if unknown := sorted({*types} - {_SLIDING, _FULL}):
        raise ValueError(
            f"`layer_types` must be among {[_SLIDING, _FULL]}. Got {unknown}."
        )
    windows = {_SLIDING: c.sliding_window, _FULL: None}
    kinds = [LayerKind(window=windows[x]) for x in types]
    if not num_shared:
        return kinds
    first = len(types) - num_shared
    if num_shared < 0 or first < 1 or {*types[:first]} != {*types}:
        raise ValueError(
            "`num_kv_shared_layers` must leave a layer of each type with keys and "
            f"values. Got {num_shared}."
        )
    wide = 2 * c.intermediate_size if c.use_double_wide_mlp else None
    shared = {"has_kv": False, "mlp_width": wide}
    return [
        replace(kind, kv_group=layer_type, **(shared if i >= first else {}))
        for i, (kind, layer_type) in enumerate(zip(kinds, types, strict=True))
    ]


def _read_heads(c: Any) -> list[Heads]:
    """Returns the sizes of the heads of each layer."""
    settings = c.to_dict()["per_layer_config"] or {}
    keys = {key for values in settings.values() for key in values}
    if unknown := sorted(keys - {"head_dim", "num_key_value_heads"}):
        raise ValueError(
            "`per_layer_config` must have only `head_dim` and `num_key_value_heads`. "
            f"Got {unknown}."
        )
    heads = [
        Heads(
            layer.num_key_value_heads,
            layer.head_dim,
            key_is_value=c.attention_k_eq_v and layer_type == _FULL,
        )
        for layer, layer_type in zip(c.per_layer_config, c.layer_types, strict=True)
    ]
    # More pairs than types mean that a type has heads of several sizes.
    if len({*zip(c.layer_types, heads, strict=True)}) > len({*c.layer_types}):
        raise ValueError(
            "`per_layer_config` must be the same for all layers of a type in "
            f"`layer_types`. Got {settings}."
        )
    return heads


def _read_rope(c: Any, layer_type: str, dim: int) -> Rope | None:
    """Returns the rotary positions of a type of layers with heads of size `dim`."""
    section, key = c.rope_parameters.get(layer_type) or {}, "partial_rotary_factor"
    if section.get("rope_type") != "proportional" or "rope_theta" not in section:
        return replace(read_rope(section, dim, c.max_position_embeddings), dim=dim)
    # Only the first pairs are rotated. Each has the frequency that it would have if all
    # pairs were rotated.
    fraction, factor = section.get(key, 1.0), section.get("factor", 1.0)
    if not is_number(fraction) or not is_number(factor) or not factor > 0:
        raise ValueError(f"`{key}` and `factor` must be numbers. Got {section}.")
    num_pairs = int(fraction * dim // 2)
    if num_pairs == 0:
        return None
    divisors = () if factor == 1 else (float(factor),) * (dim // 2)
    is_partial = num_pairs < dim // 2
    theta = float(section["rope_theta"])
    return Rope(theta, divisors, dim=dim, num_pairs=num_pairs if is_partial else 0)
