"""The text settings of models with a vision part."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .family import SIZES, read_section

# A position in an image has several dimensions (M-RoPE), which these keys describe. The
# position of a text token is the same in all dimensions, so the keys do not matter.
_MROPE_KEYS = ("mrope_section", "mrope_interleaved")
# transformers' defaults, where they differ from those of the text-only model.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"max_window_layers": 80, "num_key_value_heads": 8}
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen3_vl": {"rope_theta": 500_000.0},
}
# If one of these keys is null in the text half, it is treated as missing: its value is
# that of the whole model, or the default. For other keys, such as `sliding_window`,
# null is a value.
_MISSING_IF_NULL = ("dtype", "torch_dtype", "eos_token_id", "rope_theta")
_MISSING_IF_NULL += ("tie_word_embeddings",)


class TextHalf(NamedTuple):
    """The text half of a model with a vision part, and the names of the whole model."""

    model_type: str  # of the text-only family that reads the text half
    name: str  # of the whole model's class, without "ForConditionalGeneration"
    keys: str  # that the whole model has besides those of the text half
    # transformers' defaults for `SIZE_KEYS`; () if the files contain all sizes.
    sizes: tuple[int | None, ...] = ()


SIZE_KEYS = (*SIZES, "max_position_embeddings")
_GEMMA3_SIZES = 262_208, 2304, 9216, 26, 8, 131_072
_GEMMA4_SIZES = 262_144, 2304, 9216, 30, 8, 131_072
_UNIFIED_SIZES = 262_144, 2304, 9216, 30, 8, 262_144
_QWEN3_5_SIZES = 248_320, 4096, 12_288, 32, 16, 32_768
_QWEN3_5_MOE_SIZES = 248_320, 2048, None, 40, 16, 32_768
_GEMMA3_KEYS = "boi_token_index eoi_token_index image_token_index mm_tokens_per_image"
_GEMMA4_KEYS = """
audio_config audio_token_id boa_token_id boi_token_id eoa_token_index eoi_token_id
image_token_id video_token_id vision_soft_tokens_per_image
"""
_QWEN_KEYS = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
_IMAGE_KEYS = {*_QWEN_KEYS.split(), "vision_token_id", "vision_config"}
_VL_KEYS = f"{_QWEN_KEYS} vision_token_id {' '.join(_MROPE_KEYS)}"
_MISTRAL3_KEYS = """
image_token_id image_token_index multimodal_projector_bias projector_hidden_act
spatial_merge_size vision_feature_layer
"""
TEXT_HALVES = {  # by the `model_type` of the whole model
    "gemma3": TextHalf("gemma3_text", "Gemma3", _GEMMA3_KEYS, _GEMMA3_SIZES),
    "gemma4": TextHalf("gemma4_text", "Gemma4", _GEMMA4_KEYS, _GEMMA4_SIZES),
    "gemma4_unified": TextHalf(
        "gemma4_unified_text", "Gemma4Unified", _GEMMA4_KEYS, _UNIFIED_SIZES
    ),
    "qwen3_5": TextHalf("qwen3_5_text", "Qwen3_5", _QWEN_KEYS, _QWEN3_5_SIZES),
    "qwen3_5_moe": TextHalf(
        "qwen3_5_moe_text", "Qwen3_5Moe", _QWEN_KEYS, _QWEN3_5_MOE_SIZES
    ),
    # These text halves are read as text-only models of other families.
    "mistral3": TextHalf("mistral", "Mistral3", _MISTRAL3_KEYS),
    "qwen2_5_vl": TextHalf("qwen2", "Qwen2_5_VL", _VL_KEYS),
    "qwen3_vl": TextHalf("qwen3", "Qwen3VL", _VL_KEYS),
}


def read_text_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the text half, in the form for a text-only model.

    Args:
        raw: The `config.json` of a model with a vision part.

    Raises:
        ValueError: If the text half of a Mistral is of an unknown family, or if a value
            that must be an object is not.

    Example:
        >>> rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
        >>> raw = {"model_type": "qwen3_vl", "text_config": {"rope_scaling": rope}}
        >>> read_text_settings(raw)["rope_scaling"]
        {'type': 'default'}
    """
    kind, text = raw["model_type"], read_section(raw, "text_config")
    if raw.get("text_config") is None and kind == "qwen2_5_vl":
        # Published files have all settings in one section.
        text = {key: x for key, x in raw.items() if key not in _IMAGE_KEYS}
    text = {
        key: x
        for key, x in text.items()
        if x is not None or key not in _MISSING_IF_NULL
    }
    if kind == "mistral3" and text.get("model_type", "mistral") != "mistral":
        raise ValueError(
            '`model_type` in `text_config` must be "mistral". Got '
            f"{text['model_type']!r}. Use the engine torch."
        )
    # The whole model's config says whether the head is tied. Qwen2.5-VL is tied if
    # either config says so.
    tied_key = "tie_word_embeddings"
    is_tied_text = kind == "qwen2_5_vl" and bool(text.get(tied_key))
    if not is_tied_text and raw.get(tied_key) is not None:
        text[tied_key] = raw[tied_key]
    if kind not in _DEFAULTS:
        return text
    # Drop the keys of M-RoPE, which Qwen2 and Qwen3 do not know. The other families
    # have no M-RoPE, or know its keys (Qwen3.5).
    for name in ("rope_parameters", "rope_scaling"):
        if name in text:
            text[name] = {
                key: "default" if x == "mrope" else x
                for key, x in read_section(text, name).items()
                if key not in _MROPE_KEYS
            }
    return _DEFAULTS[kind] | text
