"""Model families: how a config object of transformers becomes a `DecoderConfig`."""

import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .config import DecoderConfig, DeltaRule, Experts, LayerKind
from .gemma4 import read_gemma4
from .hf_config import open_config, open_text_half
from .rope import read_partial_rope, read_rope

_SLIDING, _FULL = "sliding_attention", "full_attention"
# Fields of `Experts` of Mixtral and gpt-oss.
MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "names": ("w1", "w3", "w2"),
    "kernel": "block_sparse_moe.experts.{expert}.NAME.weight",
}
GPT_OSS_EXPERTS: dict[str, Any] = {"joined": "alternating", "router": "mlp.router"}
GPT_OSS_EXPERTS |= {"kernel": "mlp.experts.NAME.{expert}"}


@dataclass(frozen=True)
class Family:
    """A model family: its names in transformers, and how to read its config."""

    architecture: str  # the name of its class in transformers
    read: Callable[[Any], DecoderConfig]  # from the config object
    further_keys: str = ""  # as in `open_config`
    unread_keys: str = ""
    # For a model with a vision part: the family of its text half, and the `model_type`
    # of this half in transformers.
    text_family: str = ""
    text_type: str = ""


def _shared_fields(c: Any) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that all families have."""
    has_bias = getattr(c, "attention_bias", False)
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": getattr(c, "intermediate_size", None)
        or c.moe_intermediate_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads,
        "head_dim": _head_dim(c),
        "rms_norm_eps": c.rms_norm_eps,
        "tie_embeddings": getattr(c, "tie_word_embeddings", False),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": getattr(c, "mlp_bias", False),
    }


def _head_dim(c: Any) -> int:
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def _read_layers(c: Any, has_sections: bool = False) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers.

    With `has_sections`, `rope_parameters` has a section for layers with a window, and
    one for the others.
    """
    section, dim, context = c.rope_parameters, _head_dim(c), c.max_position_embeddings
    window = getattr(c, "sliding_window", None)
    if has_sections:
        if more := sorted(section.keys() - {_SLIDING, _FULL}):
            raise ValueError(
                "`rope_parameters` must have a section for each kind of layers. Got "
                f"the keys {more}."
            )
        full, local = (read_rope(section[x], dim, context) for x in (_FULL, _SLIDING))
    else:
        require("partial_rotary_factor", section.get("partial_rotary_factor", 1), 1)
        full = local = read_rope(section, dim, context)
    types = getattr(c, "layer_types", None)
    if types is None:  # all layers have the same window
        return (LayerKind(full, window),)
    if _SLIDING in types and not window:
        raise ValueError(
            f"`sliding_window` must be positive for {_SLIDING!r} in `layer_types`. Got "
            f"{window!r}."
        )
    kinds = {_SLIDING: LayerKind(local, window), _FULL: LayerKind(full)}
    return tuple(kinds[x] for x in _check_types(c, kinds))


def _check_types(c: Any, kinds: Mapping[str, LayerKind]) -> list[str]:
    if wrong := sorted({*c.layer_types} - kinds.keys()):
        raise ValueError(f"`layer_types` must be among {[*kinds]}. Got {wrong}.")
    return c.layer_types


def require(key: str, value: object, supported: object) -> None:
    """Raises a ValueError if an option does not have its only supported value."""
    if value != supported:
        raise ValueError(f"`{key}` must be {json.dumps(supported)}. Got {value!r}.")


def _read_llama(c: Any, has_sections: bool = False, **options: Any) -> DecoderConfig:
    """Reads a family that differs from Llama by fixed options."""
    require("hidden_act", c.hidden_act, "silu")
    fields = _shared_fields(c) | options
    return DecoderConfig(**fields, layers=_read_layers(c, has_sections))


def _read_smollm3(c: Any) -> DecoderConfig:
    config, flags = _read_llama(c), c.no_rope_layers
    if len(flags) < len(config.layers) or not {*flags} <= {0, 1}:
        raise ValueError(
            f"`no_rope_layers` must have 0 or 1 for each of {len(config.layers)} "
            f"layers. Got {flags}."
        )
    # Despite the name, a layer with 1 has rotary positions.
    layers = (
        kind if has_rope else replace(kind, rope=None)
        for kind, has_rope in zip(config.layers, flags, strict=False)
    )
    return replace(config, layers=tuple(layers))


def _read_phi3(c: Any) -> DecoderConfig:
    require("hidden_act", c.hidden_act, "silu")
    # Phi-4-mini sets `partial_rotary_factor`.
    context = c.max_position_embeddings
    rope, dim = read_partial_rope(c.rope_parameters, _head_dim(c), context)
    layers = (LayerKind(rope, c.sliding_window),)
    fields = _shared_fields(c)
    return DecoderConfig(**fields, layers=layers, rotary_dim=dim, fused=True)


def _read_experts(c: Any, **settings: Any) -> Experts:
    count = getattr(c, "num_experts", None) or c.num_local_experts
    return Experts(
        count,
        c.num_experts_per_tok,
        normalized=getattr(c, "norm_topk_prob", True),
        shared_width=getattr(c, "shared_expert_intermediate_size", 0),
        balance=c.router_aux_loss_coef if c.output_router_logits else 0.0,
        **settings,
    )


def _read_mixtral(c: Any) -> DecoderConfig:
    return _read_llama(c, experts=_read_experts(c, **MIXTRAL_EXPERTS))


def _read_olmo(c: Any, has_sections: bool = False) -> DecoderConfig:
    options = {"pre_norms": False, "post_norms": True, "qk_norms": "whole"}
    return _read_llama(c, has_sections, **options)


def _read_olmoe(c: Any) -> DecoderConfig:
    require("clip_qkv", c.clip_qkv, None)
    return _read_llama(c, qk_norms="whole", experts=_read_experts(c))


def _read_qwen2_moe(c: Any) -> DecoderConfig:
    return _with_sparse_layers(c, _read_llama(c, qkv_bias=c.qkv_bias))


def _read_qwen3_moe(c: Any) -> DecoderConfig:
    return _with_sparse_layers(c, _read_llama(c, qk_norms=True))


def _with_sparse_layers(c: Any, config: DecoderConfig) -> DecoderConfig:
    """Returns a decoder in which some layers have experts, and the others an MLP."""
    # Every `decoder_sparse_step`-th layer has experts, except `mlp_only_layers`.
    step, dense = c.decoder_sparse_step, c.mlp_only_layers
    is_sparse = [
        (i + 1) % step == 0 and i not in dense for i in range(config.num_layers)
    ]
    if not any(is_sparse):
        return config
    layers = tuple(
        kind if has_experts else replace(kind, mlp_width=config.intermediate_size)
        for kind, has_experts in zip(config.layers, is_sparse, strict=True)
    )
    return replace(
        config,
        layers=layers,
        intermediate_size=c.moe_intermediate_size,
        experts=_read_experts(c),
    )


def _read_gpt_oss(c: Any) -> DecoderConfig:
    require("swiglu_alpha", c.swiglu_alpha, 1.702)
    require("swiglu_limit", c.swiglu_limit, 7.0)
    options = {"activation": "clamped_swiglu", "mlp_bias": True, "sinks": True}
    return _read_llama(c, **options, experts=_read_experts(c, **GPT_OSS_EXPERTS))


def _read_qwen3_5(c: Any) -> DecoderConfig:
    require("hidden_act", c.hidden_act, "silu")
    # Text has the same position in all dimensions, so the sections of multimodal rotary
    # positions make no difference.
    context = c.max_position_embeddings
    rope, dim = read_partial_rope(c.rope_parameters, c.head_dim, context)
    sizes = c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim
    sizes += c.linear_value_head_dim, c.linear_conv_kernel_dim
    linear = LayerKind(None, delta_rule=DeltaRule(*sizes))
    kinds = {"linear_attention": linear, _FULL: LayerKind(rope)}
    return DecoderConfig(
        **_shared_fields(c),
        layers=tuple(kinds[x] for x in _check_types(c, kinds)),
        rotary_dim=dim,
        unit_offset_norms=True,
        qk_norms=True,
        attention_gate=True,
    )


def _read_qwen3_5_moe(c: Any) -> DecoderConfig:
    return replace(_read_qwen3_5(c), experts=_read_experts(c))


def _gemma_fields(c: Any, activation_key: str) -> dict[str, Any]:
    # Both mean false.
    if c.use_bidirectional_attention is not None:
        key = "use_bidirectional_attention"
        require(key, c.use_bidirectional_attention, False)
    gelu = "gelu_pytorch_tanh"
    require(activation_key, getattr(c, activation_key), gelu)
    scale = c.hidden_size**0.5
    options = {"unit_offset_norms": True, "embedding_scale": scale, "activation": gelu}
    return _shared_fields(c) | options


def _read_gemma(c: Any) -> DecoderConfig:
    return DecoderConfig(**_gemma_fields(c, "hidden_act"), layers=_read_layers(c))


def _read_gemma2(c: Any, has_sections: bool = False, **options: Any) -> DecoderConfig:
    return DecoderConfig(
        **_gemma_fields(c, "hidden_activation"),
        layers=_read_layers(c, has_sections),
        post_norms=True,
        attention_scale=c.query_pre_attn_scalar**-0.5,
        attention_soft_cap=c.attn_logit_softcapping,
        logit_soft_cap=c.final_logit_softcapping,
        **options,
    )


def _read_gemma3(c: Any) -> DecoderConfig:
    require("attn_logit_softcapping", c.attn_logit_softcapping, None)
    return _read_gemma2(c, has_sections=True, qk_norms=True)


# Keys that change nothing: transformers ignores them, and they repeat other keys,
# describe positions in images, or concern the prediction of further tokens.
_QWEN3_5 = "attn_output_gate mamba_ssm_dtype mlp_only_layers mtp_num_hidden_layers"
_QWEN3_5 += " mtp_use_dedicated_embeddings mrope_section mrope_interleaved"
_OSS, _PHI = (
    "experts_per_token initial_context_length",
    "full_attn_mod interpolate_factor",
)
_GEMMA3, _INTERVAL = (
    "rope_local_base_freq sliding_window_pattern",
    "full_attention_interval",
)
_GEMMA4 = "global_head_dim num_global_key_value_heads per_layer_config"
_FAMILIES = {  # of text-only models, by `model_type`
    "llama": Family("Llama", _read_llama),
    "mistral": Family("Mistral", _read_llama),
    "qwen2": Family("Qwen2", partial(_read_llama, qkv_bias=True)),
    "qwen3": Family("Qwen3", partial(_read_llama, qk_norms=True)),
    "smollm3": Family("SmolLM3", _read_smollm3, unread_keys="max_window_layers"),
    "phi3": Family("Phi3", _read_phi3, unread_keys=_PHI),
    "mixtral": Family("Mixtral", _read_mixtral),
    "olmoe": Family("Olmoe", _read_olmoe),
    "olmo2": Family("Olmo2", _read_olmo),
    "olmo3": Family("Olmo3", partial(_read_olmo, has_sections=True)),
    "qwen2_moe": Family("Qwen2Moe", _read_qwen2_moe),
    "qwen3_moe": Family("Qwen3Moe", _read_qwen3_moe, unread_keys="max_window_layers"),
    "qwen3_5_text": Family("Qwen3_5", _read_qwen3_5, _INTERVAL, _QWEN3_5),
    "qwen3_5_moe_text": Family(
        "Qwen3_5Moe", _read_qwen3_5_moe, _INTERVAL, f"{_QWEN3_5} intermediate_size"
    ),
    "gpt_oss": Family("GptOss", _read_gpt_oss, unread_keys=_OSS),
    "gemma": Family("Gemma", _read_gemma, unread_keys="hidden_activation"),
    "gemma2": Family("Gemma2", _read_gemma2, unread_keys="hidden_act"),
    "gemma3_text": Family(
        "Gemma3", _read_gemma3, _GEMMA3, "hidden_act _sliding_window_pattern"
    ),
    "gemma4_text": Family("Gemma4", read_gemma4, _GEMMA4, "hidden_act"),
    "gemma4_unified_text": Family("Gemma4Unified", read_gemma4, _GEMMA4, "hidden_act"),
}
# Models with a vision part, of which the text half is read as a text-only model. These
# are their classes, the families of their text halves, and the types of these halves.
_TEXT_HALVES = {
    "gemma3": ("Gemma3", "gemma3_text", "gemma3_text"),
    "gemma4": ("Gemma4", "gemma4_text", "gemma4_text"),
    "gemma4_unified": ("Gemma4Unified", "gemma4_unified_text", "gemma4_unified_text"),
    "qwen3_5": ("Qwen3_5", "qwen3_5_text", "qwen3_5_text"),
    "qwen3_5_moe": ("Qwen3_5Moe", "qwen3_5_moe_text", "qwen3_5_moe_text"),
    "mistral3": ("Mistral3", "mistral", "mistral"),
    "qwen2_5_vl": ("Qwen2_5_VL", "qwen2", "qwen2_5_vl_text"),
    "qwen3_vl": ("Qwen3VL", "qwen3", "qwen3_vl_text"),
}
FAMILIES = {  # by `model_type`
    name: replace(family, architecture=f"{family.architecture}ForCausalLM")
    for name, family in _FAMILIES.items()
} | {
    name: replace(
        _FAMILIES[family],
        architecture=f"{whole}ForConditionalGeneration",
        text_family=family,
        text_type=text_type,
    )
    for name, (whole, family, text_type) in _TEXT_HALVES.items()
}


def is_known(raw: Mapping[str, Any]) -> bool:
    """Whether `Decoder` knows the type of model that a `config.json` describes."""
    if not isinstance(model_type := raw.get("model_type"), str):
        raise ValueError(f"`model_type` must be text. Got {model_type!r}.")
    if model_type == "mistral3" and isinstance(text := raw.get("text_config"), Mapping):
        return text.get("model_type", "mistral") == "mistral"  # or a Ministral 3
    return model_type in FAMILIES


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder config that a `config.json` describes.

    Warns about keys that neither transformers nor this function knows.
    """
    family, settings = _open(raw)
    try:
        config = family.read(settings)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"config.json must have values of the expected types. Got {error!r}."
        ) from error
    is_half = bool(family.text_family)
    return replace(config, module="model.language_model") if is_half else config


def text_only_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without its vision part, in the form for text-only models."""
    if raw.get("model_type") not in _TEXT_HALVES:
        return dict(raw)
    with warnings.catch_warnings(action="ignore"):  # `config_from_hf` warns
        family, settings = _open(raw)
    config = settings.to_diff_dict() | {
        "architectures": [FAMILIES[family.text_family].architecture],
        "model_type": family.text_family,
    }
    for section in (raw, raw.get("text_config") or {}):
        for key in ("dtype", "torch_dtype", "eos_token_id"):
            if section.get(key) is not None:
                config[key] = section[key]
    return config


def _open(raw: Mapping[str, Any]) -> tuple[Family, Any]:
    """Returns the family, and the config object of the text-only model or text half."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES)
        relatives = f" Its nearest relatives are {near}." if near else ""
        raise ValueError(
            f"`model_type` must be one of {tuple(FAMILIES)}, as in the table of "
            "docs/models.md, or the engine must be torch. Got "
            f"{model_type!r}.{relatives}"
        )
    family = FAMILIES[model_type]
    if architectures not in (None, [], [family.architecture]):
        raise ValueError(
            f"`architectures` must be {[family.architecture]}. Got {architectures!r}."
        )
    keys = family.further_keys, family.unread_keys
    if not family.text_family:
        return family, open_config(model_type, raw, *keys)
    if not is_known(raw):
        raise ValueError(
            f"`model_type` in `text_config` must be {family.text_family!r} for the "
            f"engine jax. Got {raw['text_config']['model_type']!r}."
        )
    return family, open_text_half(model_type, family.text_type, raw, *keys)
