"""Reads the configs of DeepSeek V2 and V3, and of GLM-4.7-Flash."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .config import DecoderConfig, Experts, LatentHeads, LayerKind
from .family import (
    is_count,
    read_biases,
    read_count,
    read_flag,
    read_list,
    read_number,
    read_optional,
    read_rope,
    read_size,
    require_if_present,
    rope_section,
    shared_fields,
)

_Scores = Literal["softmax", "sigmoid"]
DEEPSEEK_KEYS = """
attention_bias first_k_dense_replace hidden_act kv_lora_rank moe_intermediate_size
n_group n_routed_experts n_shared_experts norm_topk_prob num_mtp_layers
num_nextn_predict_layers q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim
rope_interleave routed_scaling_factor scoring_func moe_layer_freq num_experts_per_tok
output_router_logits aux_loss_alpha ep_size seq_aux topk_group topk_method v_head_dim
"""
DEEPSEEK_V2_KEYS = f"{DEEPSEEK_KEYS} mlp_bias"
GLM_LITE_KEYS = f"{DEEPSEEK_KEYS} mlp_layer_types"
# transformers' defaults for missing keys.
_V3: dict[str, Any]
_V3 = {"moe_intermediate_size": 2048, "n_shared_experts": 1, "n_routed_experts": 256}
_V3 |= {"routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536}
_V3 |= {"qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128}
_V3 |= {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
_V3 |= {"first_k_dense_replace": 3, "norm_topk_prob": True, "rope_interleave": True}
_V3 |= {"num_mtp_layers": 1}
_V2 = _V3 | {"moe_intermediate_size": 1407, "n_shared_experts": 2}
_V2 |= {"n_routed_experts": 64, "routed_scaling_factor": 1.0, "n_group": None}
_V2 |= {"topk_group": None, "num_experts_per_tok": None, "first_k_dense_replace": 0}
_V2 |= {"topk_method": "greedy", "num_mtp_layers": 0}
_GLM = _V3 | {"moe_intermediate_size": 1536, "n_routed_experts": 64, "n_group": 1}
_GLM |= {"routed_scaling_factor": 1.8, "q_lora_rank": 768, "v_head_dim": 256}
_GLM |= {"qk_nope_head_dim": 192, "topk_group": 1, "num_experts_per_tok": 4}


def read_deepseek_v3(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of DeepSeek V3."""
    require_if_present(raw, {"topk_method": "noaux_tc"})
    raw = _V3 | dict(raw)
    return _read(raw, _is_dense(raw), eps=1e-6)


def read_glm_lite(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of GLM-4.7-Flash."""
    require_if_present(raw, {"topk_method": "noaux_tc"})
    types = read_list(raw, "mlp_layer_types")
    raw, count = _GLM | dict(raw), read_count(raw, "num_hidden_layers")
    if types is None:
        types = ["dense"] + ["sparse"] * (count - 1)
    if len(types) != count or {*types} - {"dense", "sparse"}:
        raise ValueError(
            "`mlp_layer_types` must have as many entries as `num_hidden_layers`, "
            f'{count}, and each must be "dense" or "sparse". Got {types}.'
        )
    return _read(raw, [layer_type == "dense" for layer_type in types], eps=1e-5)


def read_deepseek_v2(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads the config of DeepSeek V2."""
    require_if_present(raw, {"mlp_bias": False})
    raw = _V2 | dict(raw)
    groups = {"n_group": raw["n_group"], "topk_group": raw["topk_group"]}
    if (method := raw["topk_method"]) == "greedy":
        groups = {"n_group": 1, "topk_group": 1}  # this method has no groups
    elif method != "group_limited_greedy":
        raise ValueError(
            f'`topk_method` must be "greedy" or "group_limited_greedy". Got {method!r}.'
        )
    # For V2, transformers ignores `norm_topk_prob`, and always rotates pairs of
    # neighboring values.
    fixed = {"norm_topk_prob": False, "rope_interleave": True}
    return _read(raw | groups | fixed, _is_dense(raw), eps=1e-6, scores="softmax")


def _is_dense(raw: Mapping[str, Any]) -> list[bool]:
    first = read_size(raw, "first_k_dense_replace")
    return [layer < first for layer in range(read_count(raw, "num_hidden_layers"))]


def _read(
    raw: Mapping[str, Any],
    is_dense: Sequence[bool],
    *,
    eps: float,
    scores: _Scores = "sigmoid",
) -> DecoderConfig:
    query_rank, kv_rank = raw["q_lora_rank"], raw["kv_lora_rank"]
    nope_dim, rope_dim = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
    heads = LatentHeads(query_rank, kv_rank, nope_dim, rope_dim, raw["v_head_dim"])
    num_heads = read_count(raw, "num_attention_heads")
    # If these keys are present, they must repeat other sizes. Other values would change
    # the rotary positions, or leave some heads without keys. `head_dim` in a file is
    # only the rotated part of a head; in `DecoderConfig`, it is the whole head.
    total = "the sum of `qk_nope_head_dim` and `qk_rope_head_dim`"
    expected = {
        "head_dim": (heads.rope_dim, "`qk_rope_head_dim`"),
        "qk_head_dim": (heads.head_dim, total),
        "num_key_value_heads": (num_heads, "`num_attention_heads`"),
    }
    for key, (value, description) in expected.items():
        if raw.get(key) not in (None, value):
            raise ValueError(f"`{key}` must be {description}, {value}. Got {raw[key]}.")
    require_if_present(raw, {"moe_layer_freq": 1, "scoring_func": scores})
    fields = shared_fields({**raw, "num_key_value_heads": None}, eps=eps)
    fields |= {"head_dim": heads.head_dim, "rotary_dim": heads.rope_dim}
    fields |= read_biases(raw)
    rope = read_rope(raw, heads.rope_dim)
    width = raw["intermediate_size"]
    if not all(is_dense):
        fields["intermediate_size"] = read_count(raw, "moe_intermediate_size")
        fields["experts"] = _read_experts(raw, scores)
    # The layers for multi-token prediction; older files have the first name.
    mtp_keys = "num_nextn_predict_layers", "num_mtp_layers"
    mtp_key = next(key for key in mtp_keys if key in raw)
    dense = LayerKind(rope, mlp_width=width, latent=heads)
    sparse = LayerKind(rope, latent=heads)
    return DecoderConfig(
        **fields,
        layers=tuple(dense if x else sparse for x in is_dense),
        interleaved_rope=read_flag(raw, "rope_interleave"),
        attention_scale=heads.head_dim**-0.5 * _rope_scale(raw),
        num_ignored_layers=read_size(raw, mtp_key),
    )


def _read_experts(raw: Mapping[str, Any], scores: _Scores) -> Experts:
    count, num_groups = read_count(raw, "n_routed_experts"), raw["n_group"]
    # With sigmoids, the score of a group is the sum of its two best scores.
    if scores == "sigmoid" and not (is_count(num_groups) and count >= 2 * num_groups):
        raise ValueError(
            "`n_group` must leave at least two experts in each group. Got "
            f"{num_groups!r}."
        )
    width = read_count(raw, "moe_intermediate_size")
    return Experts(
        count,
        read_count(raw, "num_experts_per_tok"),
        normalized=read_flag(raw, "norm_topk_prob"),
        scores=scores,
        has_score_bias=scores == "sigmoid",
        num_groups=num_groups,
        groups_per_token=raw["topk_group"],
        scale=read_number(raw, "routed_scaling_factor"),
        shared_width=width * read_size(raw, "n_shared_experts"),
        shared_name="shared_experts",
        has_shared_gate=False,
    )


def _rope_scale(raw: Mapping[str, Any]) -> float:
    """Returns YaRN's factor of all attention scores, in addition to `Rope.scale`.

    It is the square of the factor that `mscale_all_dim` describes, since that one
    multiplies both queries and keys.
    """
    section = rope_section(raw)
    mscale = read_optional(section, "mscale_all_dim")
    kind = section.get("rope_type", section.get("type")) or "default"
    if kind == "default" or not mscale:
        return 1.0
    if (factor := section.get("factor")) is None:
        raise ValueError(f"`mscale_all_dim` must come with `factor`. Got {section}.")
    return (0.1 * mscale * math.log(factor) + 1) ** 2 if factor > 1 else 1.0
