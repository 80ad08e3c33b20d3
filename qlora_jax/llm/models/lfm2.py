"""Reads the config of LFM2."""

from collections.abc import Mapping
from typing import Any

from .config import DecoderConfig, LayerKind
from .family import (
    read_count,
    read_flag,
    read_layer_numbers,
    read_layer_types,
    read_number,
    read_optional,
    read_rope,
    require_if_present,
    shared_fields,
)

LFM2_KEYS = """
block_auto_adjust_ff_dim block_dim block_ff_dim block_ffn_dim_multiplier
block_mlp_init_scale block_multiple_of block_norm_eps block_out_init_scale
block_use_swiglu block_use_xavier_init conv_L_cache conv_bias conv_dim conv_dim_out
conv_use_xavier_init full_attn_idxs hidden_act layer_types norm_eps num_heads theta
tie_embedding use_pos_enc
"""
_FULL, _CONVOLUTION = "full_attention", "conv"
# Llama's names of modules, and those of LFM2.
_MODULE_NAMES = (
    ("input_layernorm", "operator_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("self_attn.q_norm", "self_attn.q_layernorm"),
    ("self_attn.k_norm", "self_attn.k_layernorm"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
    ("norm", "embedding_norm"),
)


def read_lfm2(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of LFM2."""
    require_if_present(raw, {"rms_norm_eps": None})  # LFM2 calls it `norm_eps`
    # Older files have other names for these keys. If a file has both names,
    # transformers reads the older one.
    older = {
        "tie_word_embeddings": "tie_embedding",
        "intermediate_size": "block_ff_dim",
    }
    renamed = {key: raw[name] for key, name in older.items() if name in raw}
    defaults = {"tie_word_embeddings": True, "intermediate_size": 12_288}
    raw = {**defaults, **raw, **renamed}
    eps = read_number(raw, "norm_eps", 1e-5)
    fields = shared_fields({**raw, "rms_norm_eps": eps}, kv_heads=8)
    fields["intermediate_size"] = _mlp_width(raw)
    width = read_count(raw, "conv_L_cache", 3)
    kinds = {
        _FULL: LayerKind(read_rope(raw, fields["head_dim"], theta=1e6)),
        _CONVOLUTION: LayerKind(None, convolution_width=width),
    }
    return DecoderConfig(
        **fields,
        layers=tuple(kinds[layer_type] for layer_type in _layer_types(raw)),
        qk_norms=True,
        convolution_bias=read_flag(raw, "conv_bias"),
        module_names=_MODULE_NAMES,
    )


def _layer_types(raw: Mapping[str, Any]) -> list[str]:
    full = read_layer_numbers(raw, "full_attn_idxs")
    types = read_layer_types(
        raw,
        (_FULL, _CONVOLUTION),
        lambda i: _FULL if full is None or i in full else _CONVOLUTION,
    )
    if _FULL not in types:
        raise ValueError(
            f"`layer_types` must have at least one {_FULL!r}. Got {types}."
        )
    return types


def _mlp_width(raw: Mapping[str, Any]) -> int:
    """Returns the width of MLPs.

    Unless `block_auto_adjust_ff_dim` is false, it is two thirds of `intermediate_size`,
    scaled, and rounded up to a multiple.
    """
    width = raw["intermediate_size"]
    if not read_flag(raw, "block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    multiplier = read_optional(raw, "block_ffn_dim_multiplier", 1.0)
    if multiplier is None:
        return width
    multiple = read_count(raw, "block_multiple_of", 256)
    return -(-int(multiplier * width) // multiple) * multiple
