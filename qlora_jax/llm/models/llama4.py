"""Reads the configs of Llama 4."""

from collections.abc import Mapping
from typing import Any

from .config import DecoderConfig, Experts, LayerKind, QueryScaling
from .family import (
    is_count,
    read_biases,
    read_count,
    read_flag,
    read_layer_numbers,
    read_layer_types,
    read_list,
    read_number,
    read_rope,
    read_rotary_flags,
    shared_fields,
)

LLAMA4_KEYS = """
attention_bias attention_chunk_size attn_scale attn_temperature_tuning floor_scale
for_llm_compressor hidden_act interleave_moe_layer_step intermediate_size_mlp
layer_types moe_layers no_rope_layer_interval no_rope_layers num_experts_per_tok
num_local_experts output_router_logits router_aux_loss_coef use_qk_norm
"""
_CHUNKED, _FULL = "chunked_attention", "full_attention"


def read_llama4(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of the text half of Llama 4."""
    fields = shared_fields(raw, head_dim=128, kv_heads=8, eps=1e-5)
    count = fields["num_layers"]
    # 1. Attention. Most layers have rotary positions, norms of queries and keys, and
    # chunks. The others scale their queries instead. An empty list means the default.
    is_rotary = read_rotary_flags(
        {**raw, "no_rope_layers": read_list(raw, "no_rope_layers") or None}
    )
    chunk = raw.get("attention_chunk_size", 8192)
    types = read_layer_types(
        raw,
        (_CHUNKED, _FULL),
        lambda i: _CHUNKED if is_rotary[i] and chunk is not None else _FULL,
    )
    if _CHUNKED in types and not is_count(chunk):
        raise ValueError(
            "`attention_chunk_size` must be a positive integer if layers have "
            f"{_CHUNKED!r}. Got {chunk!r}."
        )
    rope = read_rope(raw, fields["head_dim"], theta=500_000.0)
    has_norms = read_flag(raw, "use_qk_norm", True)
    scaling = None
    if read_flag(raw, "attn_temperature_tuning", True) and not all(is_rotary):
        length = read_count(raw, "floor_scale", 8192)
        beta = read_number(raw, "attn_scale", 0.1)
        scaling = QueryScaling(beta, length, offset=1)
    # 2. MLPs and experts.
    is_sparse = _sparse_layers(raw, count)
    dense_width = read_count(raw, "intermediate_size_mlp", 16_384)
    layers = tuple(
        LayerKind(
            rope if rotary else None,
            chunk if layer_type == _CHUNKED else None,
            mlp_width=None if sparse else dense_width,
            is_chunked=layer_type == _CHUNKED,
            unit_norms=rotary and has_norms,
            # Without scaling, the flag has no effect, and should not divide stacks.
            scales_queries=scaling is None or not rotary,
        )
        for rotary, layer_type, sparse in zip(is_rotary, types, is_sparse, strict=True)
    )
    return DecoderConfig(
        **fields,
        **read_biases(raw),
        layers=layers,
        interleaved_rope=True,
        query_scaling=scaling,
        module_names=(("mlp", "feed_forward"),),
        experts=_read_experts(raw) if any(is_sparse) else None,
    )


def _sparse_layers(raw: Mapping[str, Any], count: int) -> list[bool]:
    """Returns whether each layer has experts."""
    if (layers := read_layer_numbers(raw, "moe_layers")) is not None:
        return [i in layers for i in range(count)]
    step = read_count(raw, "interleave_moe_layer_step", 1)
    return [(i + 1) % step == 0 for i in range(count)]


def _read_experts(raw: Mapping[str, Any]) -> Experts:
    return Experts(
        read_count(raw, "num_local_experts", 16),
        read_count(raw, "num_experts_per_tok", 1),
        normalized=False,
        joined="halves",
        router="mlp.router",
        kernel="mlp.experts.NAME.{expert}",
        shared_width=raw["intermediate_size"],
        has_shared_gate=False,
        scores="sigmoid",
        weights_inputs=True,
        is_swapped=True,
    )
