"""Model families: how their Hugging Face configs are read."""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import DecoderConfig, DeltaRule, LayerKind, Rope
from .family import (
    EXPERT_KEYS,
    WINDOW_KEYS,
    Family,
    read_biases,
    read_count,
    read_experts,
    read_flag,
    read_layer_numbers,
    read_layer_types,
    read_layers,
    read_optional,
    read_partial_rope,
    read_positive,
    read_rope,
    read_rotary_flags,
    read_section,
    read_size,
    read_uniform_layers,
    require_if_present,
    rope_section,
    rope_sections,
    shared_fields,
)
from .gemma4 import GEMMA4_KEYS, read_gemma4, read_gemma4_unified
from .text_halves import SIZE_KEYS, TEXT_HALVES, read_text_settings

# Most families share Llama's architecture, and differ from it as follows. (SmolLM2 is a
# Llama.)
# - Qwen2 adds biases on q, k and v; Qwen3 adds norms of q and k.
# - SmolLM3 has no rotary positions in every fourth layer.
# - Phi-3 and Phi-4-mini have fused projections, LongRoPE and partial rotary positions.
# - Mixtral is a Mistral with experts, and Qwen3 MoE a Qwen3 with experts.
# - Qwen2-MoE is a Qwen2 with experts, one of which processes all tokens.
# - OLMoE is a Llama with experts and norms of q and k.
# - OLMo 2 has norms after attention and the MLP instead of before them, and norms of q
#   and k. OLMo 3 adds a window in three of four layers.
# - In gpt-oss, experts have biases, heads have sinks, and every other layer has a
#   window.
# - Gemma 1 has norms that multiply by one plus their scale, and scaled embeddings.
# - Gemma 2 and 3 also have norms after attention and the MLP. Gemma 2 has soft-caps,
#   and a window in every other layer. Gemma 3 has two kinds of rotary positions, and a
#   window in five of six layers; only its text half is supported.
_LONGROPE = ("longrope", "su", "yarn")  # older Phi files use the last two names
# Fields of `Experts` of Mixtral and gpt-oss.
MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "names": ("w1", "w3", "w2"),
    "kernel": "block_sparse_moe.experts.{expert}.NAME.weight",
}
GPT_OSS_EXPERTS: dict[str, Any] = {"joined": "alternating", "router": "mlp.router"}
GPT_OSS_EXPERTS |= {"kernel": "mlp.experts.NAME.{expert}"}
# The rotary section of gpt-oss, for files without one.
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
_GPT_OSS_ROPE |= {"original_max_position_embeddings": 4096}
_GELU = "gelu_pytorch_tanh"
_FULL, _LINEAR = "full_attention", "linear_attention"


def _read_llama(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"sliding_window": None})
    fields = shared_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    mlp_bias = read_flag(raw, "mlp_bias")
    return DecoderConfig(**fields, **read_biases(raw), layers=layers, mlp_bias=mlp_bias)


def _read_mistral(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"layer_types": None})  # all layers have the same window
    fields = shared_fields(raw, kv_heads=8)
    rope = read_rope(raw, fields["head_dim"])
    return DecoderConfig(**fields, layers=read_uniform_layers(raw, rope, default=4096))


def _qwen_layers(raw: Mapping[str, Any], rope: Rope) -> tuple[LayerKind, ...]:
    """Returns the layers; those from `max_window_layers` on may have a window."""
    has_windows = read_flag(raw, "use_sliding_window")
    window = raw.get("sliding_window", 4096) if has_windows else None
    first = None if window is None else read_size(raw, "max_window_layers", 28)
    return read_layers(raw, lambda i: first is not None and i >= first, window, rope)


def _read_qwen2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=32)
    layers = _qwen_layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, layers=layers, qkv_bias=True)


def _read_qwen3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, head_dim=128, kv_heads=32)
    layers = _qwen_layers(raw, read_rope(raw, fields["head_dim"]))
    return DecoderConfig(**fields, **read_biases(raw), layers=layers, qk_norms=True)


def _read_smollm3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=4, tied=True)
    is_rotary = read_rotary_flags(raw)
    window = raw.get("sliding_window")
    has_windows = read_flag(raw, "use_sliding_window") and window is not None
    rope = read_rope(raw, fields["head_dim"], theta=2e6)
    kinds = read_layers(raw, lambda i: has_windows and not is_rotary[i], window, rope)
    layers = tuple(
        kind if rotary else replace(kind, rope=None)
        for kind, rotary in zip(kinds, is_rotary, strict=True)
    )
    mlp_bias = read_flag(raw, "mlp_bias")
    return DecoderConfig(**fields, **read_biases(raw), layers=layers, mlp_bias=mlp_bias)


def _read_phi3(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, eps=1e-5)
    original = raw.get("original_max_position_embeddings", 4096)
    section = dict(rope_section(raw))
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind not in ("default", *_LONGROPE):
        raise ValueError(f'`rope_type` must be "default" or "longrope". Got {kind!r}.')
    section["rope_type"] = "longrope" if kind in _LONGROPE else kind
    raw = {**raw, "original_max_position_embeddings": original, "rope_scaling": section}
    # Phi-4-mini sets `partial_rotary_factor`.
    rope, dim = read_partial_rope(raw, fields["head_dim"], fraction=1.0)
    layers = read_uniform_layers(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, rotary_dim=dim, fused=True)


def _read_mixtral(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = shared_fields(raw, kv_heads=8, eps=1e-5)
    experts = read_experts(raw, 8, 2, **MIXTRAL_EXPERTS)
    rope = read_rope(raw, fields["head_dim"], theta=1e6)
    layers = read_uniform_layers(raw, rope, default=None)
    return DecoderConfig(**fields, layers=layers, experts=experts)


def _read_olmoe(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"clip_qkv": None})
    fields = shared_fields(raw, eps=1e-5) | read_biases(raw)
    normalized = read_flag(raw, "norm_topk_prob")
    experts = read_experts(raw, 64, 8, balance=0.01, normalized=normalized)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    return DecoderConfig(**fields, layers=layers, experts=experts, qk_norms="whole")


def _olmo_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    require_if_present(raw, {"clip_qkv": None})
    norms = {"pre_norms": False, "post_norms": True, "qk_norms": "whole"}
    return shared_fields(raw, eps=1e-5) | read_biases(raw) | norms


def _read_olmo2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = _olmo_fields(raw)
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    return DecoderConfig(**fields, layers=layers)


def _read_olmo3(raw: Mapping[str, Any]) -> DecoderConfig:
    # transformers uses this base in layers with a window, whatever the file says.
    require_if_present(raw, {"rope_theta": 500_000.0})
    fields = _olmo_fields(raw)
    ropes = (
        read_rope(raw, fields["head_dim"], theta=500_000.0, section=section)
        for section in rope_sections(raw)
    )
    window = raw.get("sliding_window", 4096)
    layers = read_layers(raw, lambda i: (i + 1) % 4 != 0, window, *ropes)
    return DecoderConfig(**fields, layers=layers)


def _read_qwen3_moe(raw: Mapping[str, Any]) -> DecoderConfig:
    fields: dict[str, Any] = shared_fields(raw, kv_heads=4) | read_biases(raw)
    fields["qk_norms"] = True
    if not read_flag(raw, "use_sliding_window"):
        raw = {**raw, "sliding_window": None}
    [kind] = read_uniform_layers(raw, read_rope(raw, fields["head_dim"]), 4096)
    kinds = (kind,) * fields["num_layers"]
    return _read_sparse(raw, fields, kinds, width=768, count=128, per_token=8)


def _read_qwen2_moe(raw: Mapping[str, Any]) -> DecoderConfig:
    fields: dict[str, Any] = shared_fields(raw, kv_heads=16)
    fields["qkv_bias"] = read_flag(raw, "qkv_bias", True)
    # In Qwen2, only layers from `max_window_layers` on have a window. Here, it is the
    # layers before it, and only every other one of them.
    has_windows = read_flag(raw, "use_sliding_window")
    end = read_size(raw, "max_window_layers", 28) if has_windows else 0
    window = raw.get("sliding_window", 4096) if has_windows else None
    rope = read_rope(raw, fields["head_dim"])
    kinds = read_layers(raw, lambda i: i % 2 == 0 and i < end, window, rope)
    settings = {"count": 60, "per_token": 4}
    settings["shared_width"] = read_size(raw, "shared_expert_intermediate_size", 5632)
    return _read_sparse(raw, fields, kinds, width=1408, **settings)


def _read_sparse(
    raw: Mapping[str, Any],
    fields: dict[str, Any],
    kinds: tuple[LayerKind, ...],
    *,
    width: int,
    **settings: Any,
) -> DecoderConfig:
    """Returns a decoder in which some layers have experts, and the others an MLP.

    `width` is the family's default for `moe_intermediate_size`. `settings` are
    arguments of `read_experts`.
    """
    # Every `decoder_sparse_step`-th layer has experts, except `mlp_only_layers`.
    step = read_count(raw, "decoder_sparse_step", 1)
    dense = read_layer_numbers(raw, "mlp_only_layers") or ()
    is_sparse = [(i + 1) % step == 0 and i not in dense for i in range(len(kinds))]
    if not any(is_sparse):
        return DecoderConfig(**fields, layers=kinds)
    dense_width = fields["intermediate_size"]
    layers = tuple(
        kind if has_experts else replace(kind, mlp_width=dense_width)
        for kind, has_experts in zip(kinds, is_sparse, strict=True)
    )
    width = read_count(raw, "moe_intermediate_size", width)
    fields = fields | {"intermediate_size": width}
    normalized = read_flag(raw, "norm_topk_prob")
    experts = read_experts(raw, **settings, normalized=normalized)
    return DecoderConfig(**fields, layers=layers, experts=experts)


def _read_gpt_oss(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0})
    fields = shared_fields(raw, head_dim=64, kv_heads=8, eps=1e-5)
    fields |= {"activation": "clamped_swiglu", "mlp_bias": True, "sinks": True}
    fields |= read_biases({"attention_bias": True, **raw})
    section = rope_section(raw) or _GPT_OSS_ROPE
    rope = read_rope(raw, fields["head_dim"], theta=150_000.0, section=section)
    window = raw.get("sliding_window", 128)
    layers = read_layers(raw, lambda i: i % 2 == 0, window, rope)
    experts = read_experts(raw, 128, 4, **GPT_OSS_EXPERTS)
    return DecoderConfig(**fields, layers=layers, experts=experts)


def _read_qwen3_5(raw: Mapping[str, Any], kv_heads: int = 4) -> DecoderConfig:
    require_if_present(raw, {"attn_output_gate": True, "mamba_ssm_dtype": "float32"})
    require_if_present(raw, {"mlp_only_layers": []})
    fields = shared_fields(raw, head_dim=256, kv_heads=kv_heads) | read_biases(raw)
    # Text has the same position in all dimensions, so the sections of multimodal rotary
    # positions make no difference.
    rope, dim = read_partial_rope(raw, fields["head_dim"], fraction=0.25)
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    defaults = zip((*names, "conv_kernel_dim"), (16, 32, 128, 128, 4), strict=True)
    rule = DeltaRule(*(raw.get(f"linear_{name}", size) for name, size in defaults))
    # By default, every `full_attention_interval`-th layer has attention.
    interval = read_count(raw, "full_attention_interval", 4)
    types = read_layer_types(
        raw, (_FULL, _LINEAR), lambda i: _LINEAR if (i + 1) % interval else _FULL
    )
    full, linear = LayerKind(rope), LayerKind(None, delta_rule=rule)
    return DecoderConfig(
        **fields,
        layers=tuple(full if kind == _FULL else linear for kind in types),
        rotary_dim=dim,
        unit_offset_norms=True,
        qk_norms=True,
        attention_gate=True,
    )


def _read_qwen3_5_moe(raw: Mapping[str, Any]) -> DecoderConfig:
    width = read_count(raw, "moe_intermediate_size", 512)
    config = _read_qwen3_5({**raw, "intermediate_size": width}, kv_heads=2)
    shared_width = read_size(raw, "shared_expert_intermediate_size", 512)
    experts = read_experts(raw, 256, 8, shared_width=shared_width)
    return replace(config, experts=experts)


def _gemma_fields(
    raw: Mapping[str, Any], kv_heads: int, activation_key: str
) -> dict[str, Any]:
    if raw.get("use_bidirectional_attention"):  # null means false
        require_if_present(raw, {"use_bidirectional_attention": False})
    defaults: dict[str, Any] = {"head_dim": 256, "kv_heads": kv_heads, "tied": True}
    fields = shared_fields(raw, **defaults, activation=(activation_key, _GELU))
    scale = fields["hidden_size"] ** 0.5
    fields |= {"unit_offset_norms": True, "embedding_scale": scale}
    return fields | read_biases(raw)


def _read_gemma(raw: Mapping[str, Any]) -> DecoderConfig:
    # In published files, "gelu" means its tanh approximation, and `hidden_activation`
    # is null or says the same.
    if raw.get("hidden_activation") is not None:
        require_if_present(raw, {"hidden_activation": _GELU})
    if raw.get("hidden_act") == "gelu":
        raw = {**raw, "hidden_act": _GELU}
    fields = _gemma_fields(raw, 16, "hidden_act")
    layers = (LayerKind(read_rope(raw, fields["head_dim"])),)
    return DecoderConfig(**fields, layers=layers)


def _gemma2_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    fields = _gemma_fields(raw, 4, "hidden_activation")
    scale = read_positive(raw, "query_pre_attn_scalar", 256) ** -0.5
    return fields | {"post_norms": True, "attention_scale": scale}


def _read_gemma2(raw: Mapping[str, Any]) -> DecoderConfig:
    fields = _gemma2_fields(raw)
    rope = read_rope(raw, fields["head_dim"])
    window = raw.get("sliding_window", 4096)
    return DecoderConfig(
        **fields,
        layers=read_layers(raw, lambda i: i % 2 == 0, window, rope),
        attention_soft_cap=read_optional(raw, "attn_logit_softcapping", 50.0),
        logit_soft_cap=read_optional(raw, "final_logit_softcapping", 30.0),
    )


def _read_gemma3(raw: Mapping[str, Any]) -> DecoderConfig:
    require_if_present(raw, {"attn_logit_softcapping": None})
    fields = _gemma2_fields(raw)
    full, local = rope_sections(raw)
    local = {"rope_theta": raw.get("rope_local_base_freq"), **local}
    dim, window = fields["head_dim"], raw.get("sliding_window", 4096)
    ropes = (
        read_rope(raw, dim, theta=1e6, section=full),
        # The `rope_theta` of the file is for layers with full attention only.
        read_rope({**raw, "rope_theta": None}, dim, section=local),
    )
    period = read_count(raw, "sliding_window_pattern", 6)
    layers = read_layers(raw, lambda i: (i + 1) % period != 0, window, *ropes)
    cap = read_optional(raw, "final_logit_softcapping")
    return DecoderConfig(**fields, layers=layers, qk_norms=True, logit_soft_cap=cap)


def text_only_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without its vision part, in the form for text-only models."""
    if str(raw.get("model_type")) not in TEXT_HALVES:
        return dict(raw)
    half, text = TEXT_HALVES[raw["model_type"]], read_text_settings(raw)
    family = FAMILIES[half.model_type]
    names = {"architectures": [*family.architectures], "model_type": family.model_type}
    shared_keys = ("dtype", "torch_dtype", "eos_token_id")
    shared = {key: raw[key] for key in shared_keys if key in raw}
    sizes = zip(SIZE_KEYS, half.sizes, strict=False)
    defaults = {key: size for key, size in sizes if size is not None}
    return defaults | shared | text | names


def _read_text_half(raw: Mapping[str, Any]) -> DecoderConfig:
    text = text_only_config(raw)
    config = FAMILIES[text["model_type"]].read_config(text)
    return replace(config, module="model.language_model")


# The keys that each family reads besides the common ones.
_LLAMA_KEYS = "attention_bias hidden_act mlp_bias sliding_window"
_MISTRAL_KEYS = "hidden_act layer_types sliding_window"
_MIXTRAL_KEYS = f"hidden_act sliding_window {EXPERT_KEYS}"
_OLMO_KEYS = "attention_bias clip_qkv hidden_act"
_OLMOE_KEYS = f"attention_bias clip_qkv hidden_act norm_topk_prob {EXPERT_KEYS}"
_QWEN_KEYS = f"hidden_act max_window_layers use_sliding_window {WINDOW_KEYS}"
_SMOLLM3_KEYS = "attention_bias hidden_act max_window_layers mlp_bias no_rope_layers"
_SMOLLM3_KEYS += f" no_rope_layer_interval use_sliding_window {WINDOW_KEYS}"
_QWEN2_MOE_KEYS = "decoder_sparse_step mlp_only_layers moe_intermediate_size qkv_bias"
_QWEN2_MOE_KEYS += " norm_topk_prob shared_expert_intermediate_size"
_QWEN2_MOE_KEYS += f" {_QWEN_KEYS} {EXPERT_KEYS}"
_QWEN3_MOE_KEYS = "decoder_sparse_step mlp_only_layers moe_intermediate_size"
_QWEN3_MOE_KEYS += " attention_bias hidden_act max_window_layers norm_topk_prob"
_QWEN3_MOE_KEYS += f" sliding_window use_sliding_window {EXPERT_KEYS}"
# `experts_per_token` and `initial_context_length` in published files repeat other keys.
_GPT_OSS_KEYS = "attention_bias experts_per_token hidden_act initial_context_length"
_GPT_OSS_KEYS += f" swiglu_alpha swiglu_limit {WINDOW_KEYS} {EXPERT_KEYS}"
# Published files have `hidden_act`, but transformers reads `hidden_activation`.
_GEMMA_KEYS = "attention_bias hidden_act hidden_activation use_bidirectional_attention"
_GEMMA2_KEYS = "attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar"
_GEMMA2_KEYS += f" {_GEMMA_KEYS} {WINDOW_KEYS}"
# Where files have `_sliding_window_pattern`, `layer_types` says the same.
_GEMMA3_KEYS = "_sliding_window_pattern rope_local_base_freq sliding_window_pattern"
_GEMMA3_KEYS += f" {_GEMMA2_KEYS}"
_QWEN3_5_KEYS = "attention_bias attn_output_gate full_attention_interval hidden_act"
_QWEN3_5_KEYS += " linear_num_key_heads linear_num_value_heads linear_key_head_dim"
_QWEN3_5_KEYS += " linear_value_head_dim linear_conv_kernel_dim layer_types"
_QWEN3_5_KEYS += " mamba_ssm_dtype mlp_only_layers mtp_num_hidden_layers"
_QWEN3_5_KEYS += " mtp_use_dedicated_embeddings mrope_section mrope_interleaved"
_QWEN3_5_MOE_KEYS = "moe_intermediate_size shared_expert_intermediate_size"
_QWEN3_5_MOE_KEYS += f" {_QWEN3_5_KEYS} {EXPERT_KEYS}"
_FAMILIES = (
    Family("llama", ("LlamaForCausalLM",), _read_llama, _LLAMA_KEYS),
    Family("mistral", ("MistralForCausalLM",), _read_mistral, _MISTRAL_KEYS),
    Family("qwen2", ("Qwen2ForCausalLM",), _read_qwen2, _QWEN_KEYS),
    Family("qwen3", ("Qwen3ForCausalLM",), _read_qwen3, f"attention_bias {_QWEN_KEYS}"),
    Family("smollm3", ("SmolLM3ForCausalLM",), _read_smollm3, _SMOLLM3_KEYS),
    Family("phi3", ("Phi3ForCausalLM",), _read_phi3, "hidden_act sliding_window"),
    Family("mixtral", ("MixtralForCausalLM",), _read_mixtral, _MIXTRAL_KEYS),
    Family("olmoe", ("OlmoeForCausalLM",), _read_olmoe, _OLMOE_KEYS),
    Family("qwen2_moe", ("Qwen2MoeForCausalLM",), _read_qwen2_moe, _QWEN2_MOE_KEYS),
    Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _read_qwen3_moe, _QWEN3_MOE_KEYS),
    Family("qwen3_5_text", ("Qwen3_5ForCausalLM",), _read_qwen3_5, _QWEN3_5_KEYS),
    Family(
        "qwen3_5_moe_text",
        ("Qwen3_5MoeForCausalLM",),
        _read_qwen3_5_moe,
        _QWEN3_5_MOE_KEYS,
    ),
    Family("gpt_oss", ("GptOssForCausalLM",), _read_gpt_oss, _GPT_OSS_KEYS),
    Family("gemma", ("GemmaForCausalLM",), _read_gemma, _GEMMA_KEYS),
    Family("gemma2", ("Gemma2ForCausalLM",), _read_gemma2, _GEMMA2_KEYS),
    Family("gemma3_text", ("Gemma3ForCausalLM",), _read_gemma3, _GEMMA3_KEYS),
    Family("gemma4_text", ("Gemma4ForCausalLM",), read_gemma4, GEMMA4_KEYS),
    Family(
        "gemma4_unified_text",
        ("Gemma4UnifiedForCausalLM",),
        read_gemma4_unified,
        GEMMA4_KEYS,
    ),
    Family("olmo2", ("Olmo2ForCausalLM",), _read_olmo2, _OLMO_KEYS),
    Family("olmo3", ("Olmo3ForCausalLM",), _read_olmo3, f"{_OLMO_KEYS} {WINDOW_KEYS}"),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}
FAMILIES |= {
    name: Family(
        name,
        (f"{half.name}ForConditionalGeneration",),
        _read_text_half,
        f"text_config vision_config {half.keys} {FAMILIES[half.model_type].keys}",
    )
    for name, half in TEXT_HALVES.items()
}


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether `Decoder` knows the type of model that a `config.json` describes."""
    if not isinstance(model_type := raw.get("model_type"), str):
        raise ValueError(f"`model_type` must be text. Got {model_type!r}.")
    if model_type == "mistral3":  # its text half may also be a Ministral 3
        return read_section(raw, "text_config").get("model_type") in (None, "mistral")
    return model_type in FAMILIES


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder config that a `config.json` describes.

    Warns about keys that are not read, unless they are known not to change the logits.

    Args:
        raw: The values in the file.

    Raises:
        ValueError: If `Decoder` does not support the family, or one of its options.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32,
        ...     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        >>> config_from_hf(raw).num_kv_heads
        4
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES)
        relatives = f" Its nearest relatives are {near}." if near else ""
        raise ValueError(
            f"`model_type` must be one of {tuple(FAMILIES)}, as in the table of "
            f"docs/models.md. Got {model_type!r}."
            f"{relatives}"
        )
    family = FAMILIES[model_type]
    try:
        if architectures and not set(architectures) & set(family.architectures):
            raise ValueError(
                f"`architectures` must be {[*family.architectures]}. Got "
                f"{architectures}."
            )
        config = family.read_config(raw)
        settings = {**raw, **(raw.get("text_config") or {})}
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"config.json must have values of the expected types. Got {error!r}."
        ) from error
    if unknown := family.unknown_keys(settings):
        warnings.warn(
            f"These keys of config.json are unknown, and are ignored: {unknown}. If "
            "they change what the model computes, the results are wrong.",
            stacklevel=2,
        )
    return config
