"""Opens a `config.json` as a config object of transformers."""

import dataclasses
import json
import logging
import re
import typing
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .config import MAX_LAYERS

# Keys of older files, which the config classes replace by others.
_OLDER_KEYS = frozenset(("rope_theta", "rope_scaling", "partial_rotary_factor"))
# Keys that do not change a trained model's logits, and that only some config classes
# have. Older versions of transformers wrote most of them, and other programs the rest.
_HARMLESS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    attn_implementation auto_map cross_attention_hidden_size finetuning_task
    gradient_checkpointing is_decoder is_llama_config max_sequence_length
    model_max_length model_name model_type num_labels prefix pretraining_tp pruned_heads
    quantization quantization_config router_jitter_noise task_specific_params
    tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config unsloth_fixed unsloth_version use_bfloat16
    """.split()
)
_HARMLESS_ENDINGS = ("_token_id", "dropout", "_pdrop")
# transformers applies these options to models of all classes, even if a class does not
# have them. Each has the values that change nothing.
_APPLIED_TO_ALL = {
    "is_causal": (None, True),
    "layer_types": (None,),
    "per_layer_config": (None,),
    "sliding_window": (None,),
}


def import_transformers() -> Any:
    """Returns transformers, which takes a second to import, without its advice."""
    # It recommends PyTorch, which neither tokenizers nor configs need.
    logger = logging.getLogger("transformers")
    logger.addFilter(_is_no_advice)
    try:
        import transformers
    except ImportError as error:
        raise ImportError("models need: pip install 'qlora-jax[models]'") from error
    finally:
        logger.removeFilter(_is_no_advice)
    return transformers


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _config_class(model_type: str) -> Any:
    auto = import_transformers().models.auto
    return auto.configuration_auto.CONFIG_MAPPING[model_type]


def open_config(
    model_type: str,
    raw: Mapping[str, Any],
    further_keys: str = "",
    unread_keys: str = "",
    outside: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Returns the config object that transformers makes of a file.

    The object has the values that the file leaves out. Only values that the class knows
    are passed to it: others could replace its methods, or take hours. A warning names
    the keys that neither the class nor our readers know.

    `further_keys` are keys that the class takes besides its fields, and `unread_keys`
    keys of published files that transformers ignores. `outside` has the values outside
    of the text half of a model with a vision part.
    """
    config_class = _config_class(model_type)
    fields = _field_names(config_class)
    taken = taken_keys(model_type) | {*further_keys.split()}
    for key, neutral in _APPLIED_TO_ALL.items():
        if key not in taken and raw.get(key) not in neutral:
            raise ValueError(
                f"`{key}` must be {json.dumps(neutral[-1])} for a {model_type}. Got "
                f"{raw[key]!r}."
            )
    count = raw.get("num_hidden_layers", 1)
    if type(count) is int and count > MAX_LAYERS:
        raise ValueError(
            f"`num_hidden_layers` must be at most {MAX_LAYERS}. Got {count}."
        )
    unknown = _unknown_keys({**outside, **raw}, taken | fields | {*unread_keys.split()})
    # Null means that a key is missing, unless it is a field of the class.
    values = {
        k: x for k, x in raw.items() if k in taken and (k in fields or x is not None)
    }
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(section := values.get(name), Mapping):
            values[name], more = _known_rope_keys(section)
            unknown += [f"{name}.{key}" for key in more]
    if unknown:
        warnings.warn(
            f"These keys of config.json are unknown, and are ignored: "
            f"{sorted(unknown)}. If they change what the model computes, the results "
            "are wrong.",
            stacklevel=5,
        )
    try:
        return import_transformers().AutoConfig.for_model(model_type, **values)
    except MemoryError:
        raise
    except Exception as error:  # of many types, for values of other types
        message = " ".join(f"{type(error).__name__}: {error}".split())
        message = re.sub(r"^.*alidation error .*?: \w+Error: ", "", message)
        message = re.sub(r"^Field '(\w+)'", r"`\1`", message)[:400]
        raise ValueError(
            f"config.json must be one that transformers accepts for a {model_type}. "
            f"{message}"
        ) from error


def taken_keys(model_type: str) -> set[str]:
    """Returns the keys that a config class takes, without those that change nothing."""
    config_class = _config_class(model_type)
    # The fields of all classes are about files, classifiers, and outputs.
    common = _field_names(import_transformers().PretrainedConfig)
    names = {*config_class.attribute_map, *config_class.attribute_map.values()}
    return (_field_names(config_class) - common) | names | _OLDER_KEYS | {"head_dim"}


def _field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def _unknown_keys(raw: Mapping[str, Any], known: set[str]) -> list[str]:
    """Returns the keys that are not known, and may change the logits."""
    generation = vars(import_transformers().GenerationConfig()).keys()
    known = known | _HARMLESS_KEYS | generation
    return [
        key
        for key, value in raw.items()
        if key not in known
        and not key.endswith(_HARMLESS_ENDINGS)
        and value not in (None, False)
    ]


def _known_rope_keys(section: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns a copy of a section, without unknown keys, and these keys.

    Each kind of layer may have a section of its own.
    """
    from transformers.modeling_rope_utils import RopeParameters

    known = {*typing.get_type_hints(RopeParameters), "type", "mrope_interleaved"}
    copied, unknown = {}, []
    for key, value in section.items():
        if isinstance(value, Mapping):
            copied[key], more = _known_rope_keys(value)
            unknown += more
        elif key in known:
            copied[key] = value
        elif value is not None:
            unknown.append(key)
    older_name = copied.pop("type", None)
    if kind := copied.pop("rope_type", None) or older_name:
        copied["rope_type"] = "longrope" if kind == "su" else kind
    return copied, unknown


def open_text_half(
    model_type: str,
    text_type: str,
    raw: Mapping[str, Any],
    further_keys: str = "",
    unread_keys: str = "",
) -> Any:
    """Returns the config object of the text half of a model with a vision part.

    `model_type` is the type of the whole model, and `text_type` that of the half.
    """
    fields, text = _field_names(_config_class(model_type)), raw.get("text_config")
    if text is None and model_type == "qwen2_5_vl":
        # Published files have all settings in one section.
        text = {key: x for key, x in raw.items() if key not in fields}
    elif not isinstance(text, Mapping):
        raise ValueError(f"`text_config` must be an object. Got {text!r}.")
    outside = {key: x for key, x in raw.items() if key not in fields}
    key = "tie_word_embeddings"
    untied = {name: x for name, x in text.items() if name != key}
    config = open_config(text_type, untied, further_keys, unread_keys, outside)
    # The whole model's config says whether the head is tied, if it says so at all.
    # Qwen2.5-VL is tied if either config says so.
    values = [x for x in (raw.get(key), text.get(key)) if x is not None]
    if wrong := [x for x in values if not isinstance(x, bool)]:
        raise ValueError(f"`{key}` must be true or false. Got {wrong[0]!r}.")
    if values:
        config.tie_word_embeddings = (
            any(values) if model_type == "qwen2_5_vl" else values[0]
        )
    # Text has the same position in all dimensions, so text-only models do not have the
    # sections of multimodal rotary positions.
    if isinstance(config.rope_parameters, dict):
        for name in ("mrope_section", "mrope_interleaved"):
            config.rope_parameters.pop(name, None)
    return config
