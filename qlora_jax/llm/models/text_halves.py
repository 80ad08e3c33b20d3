"""The text settings of models with a vision part."""

from collections.abc import Mapping
from typing import Any

# A position in an image has several dimensions (M-RoPE), which these keys describe. The
# position of a text token is the same in all dimensions, so the keys do not matter.
_MROPE_KEYS = ("mrope_section", "mrope_interleaved")
# transformers' defaults, where they differ from those of the text-only model.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"max_window_layers": 80, "num_key_value_heads": 8}
    | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen3_vl": {"rope_theta": 500_000.0},
}
_MISTRALS = ("mistral", "ministral3")
_IMAGE_KEYS = ("image_token_id", "video_token_id", "vision_config", "vision_token_id")
_IMAGE_KEYS += ("vision_start_token_id", "vision_end_token_id")


def read_text_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the text half, in the form for a text-only model.

    Args:
        raw: The `config.json` of a model with a vision part.

    Raises:
        ValueError: If the text half of a Mistral is of an unknown family.

    Example:
        >>> rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
        >>> raw = {"model_type": "qwen3_vl", "text_config": {"rope_scaling": rope}}
        >>> read_text_settings(raw)["rope_scaling"]
        {'type': 'default'}
    """
    kind, text = raw["model_type"], raw.get("text_config")
    if text is None and kind == "qwen2_5_vl":
        # Published files have all settings in one section.
        text = {key: x for key, x in raw.items() if key not in _IMAGE_KEYS}
    text = {key: x for key, x in (text or {}).items() if x is not None}
    if kind == "mistral3" and text.get("model_type", "mistral") not in _MISTRALS:
        raise ValueError(
            f"`model_type` in `text_config` must be one of {_MISTRALS}. Got "
            f"{text['model_type']!r}."
        )
    if kind not in _DEFAULTS:
        return text
    for name in ("rope_parameters", "rope_scaling"):
        if name in text:
            text[name] = {
                key: "default" if x == "mrope" else x
                for key, x in text[name].items()
                if key not in _MROPE_KEYS
            }
    return _DEFAULTS[kind] | text
