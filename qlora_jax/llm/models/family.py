"""The `Family` class, and helpers that read a `config.json`."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import numpy as np

from .config import DecoderConfig, Experts, LayerKind, Rope

# The keys that every family requires, and other keys that every family reads.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads",)
_COMMON_KEYS = """
architectures head_dim is_causal max_position_embeddings model_type
num_key_value_heads original_max_position_embeddings partial_rotary_factor
per_layer_config rms_norm_eps rope_parameters rope_scaling rope_theta
tie_word_embeddings
"""
# Keys that do not change a trained model's logits. They concern files, tokens,
# training, generation or classifiers, or are written by other programs.
HARMLESS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path
    add_cross_attention attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop embedding_dropout
    encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length model_max_length model_name no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads quantization quantization_config remove_invalid_values
    repetition_penalty resid_pdrop residual_dropout return_dict return_dict_in_generate
    router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
# Keys that families with experts read, and keys that families with windows read.
EXPERT_KEYS = """
num_experts num_local_experts num_experts_per_tok output_router_logits
router_aux_loss_coef
"""
WINDOW_KEYS = "layer_types sliding_window"
# Keys in published files that change nothing if they have this value.
_NEUTRAL = {
    "attention_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "use_mrope": False,
}
# Limits far above any published model. Larger values are errors in the file, and would
# use up all memory.
_MAX_LAYERS, _MAX_HEAD_DIM, _MAX_COUNT = 10_000, 1 << 16, 1 << 31
_SLIDING, _FULL = "sliding_attention", "full_attention"


class UnsupportedOption(ValueError):
    """An option of a config does not have its only supported value."""

    def __init__(self, message: str, supported: Mapping[str, object]):
        super().__init__(message)
        self.supported = supported  # the supported value of each of these options


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its names in transformers, and how to read its config."""

    model_type: str  # in `config.json`
    architectures: tuple[str, ...]  # names of classes in transformers
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    keys: str  # keys that it reads besides the common ones, separated by spaces

    def unknown_keys(self, raw: Mapping[str, Any]) -> list[str]:
        """Returns the keys that are not read, but may change the logits."""
        known_keys = HARMLESS_KEYS.union(SIZES, _COMMON_KEYS.split(), self.keys.split())
        unknown = [
            key
            for key, value in raw.items()
            if key not in known_keys and value not in (None, _NEUTRAL.get(key))
        ]
        for name in ("rope_parameters", "rope_scaling"):
            section = raw.get(name)
            if not isinstance(section, Mapping):
                continue
            # Each kind of layer may have a section of its own.
            nested = [x for x in section.values() if isinstance(x, Mapping)]
            for rope in (section, *nested):
                unknown += [
                    f"{name}.{key}"
                    for key, value in rope.items()
                    if key not in _ROPE_KEYS | known_keys
                    and not (value is None or isinstance(value, Mapping))
                ]
        return sorted(unknown)


def shared_fields(
    raw: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that all families read in the same way.

    The keyword arguments are the family's defaults for missing keys. An exception is
    `activation`, a pair: the key that names the activation function, and the only value
    of this key that the family supports.
    """
    # 1. Check the sizes, including optional ones that are present.
    limits = {"num_hidden_layers": _MAX_LAYERS}
    wrong = [k for k in SIZES if not is_count(raw.get(k), limits.get(k, _MAX_COUNT))]
    keys = ("head_dim", "num_key_value_heads")
    wrong += [k for k in keys if raw.get(k) is not None and not is_count(raw[k])]
    if wrong:
        values = {key: raw.get(key) for key in wrong}
        raise ValueError(f"{wrong} must be positive integers. Got {values}.")
    # 2. Check the values that all families require.
    key, value = activation
    require_if_present(raw, {key: value, "per_layer_config": None, "is_causal": True})
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    size = raw.get("head_dim", head_dim) or width // heads
    if not is_count(size, _MAX_HEAD_DIM):
        raise ValueError(f"`head_dim` must be from 1 to {_MAX_HEAD_DIM}. Got {size}.")
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": width,
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads", kv_heads) or heads,
        "head_dim": size,
        "activation": value,
        "rms_norm_eps": read_number(raw, "rms_norm_eps", eps),
        "tie_embeddings": read_flag(raw, "tie_word_embeddings", tied),
    }


def read_biases(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Reads `attention_bias`: whether the projections q, k, v and o have biases."""
    has_bias = read_flag(raw, "attention_bias")
    return {"qkv_bias": has_bias, "o_bias": has_bias}


def read_experts(
    raw: Mapping[str, Any],
    count: int,
    per_token: int,
    *,
    balance: float = 0.001,
    **settings: Any,
) -> Experts:
    """Returns the mixture of experts.

    `count`, `per_token` and `balance` are the family's defaults for missing keys.
    `balance` is the weight of the load-balancing loss, which is off by default.
    """
    balance = read_number(raw, "router_aux_loss_coef", balance)
    return Experts(
        raw.get("num_experts", raw.get("num_local_experts", count)),
        raw.get("num_experts_per_tok", per_token),
        balance=balance if read_flag(raw, "output_router_logits") else 0.0,
        **settings,
    )


def require_if_present(raw: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises `UnsupportedOption` if `raw` has another value for one of these keys."""
    wrong = {key: x for key, x in values.items() if key in raw and raw[key] != x}
    if wrong:
        messages = (
            f"`{key}` must be {json.dumps(value)}. Got {raw[key]!r}."
            for key, value in wrong.items()
        )
        raise UnsupportedOption(" ".join(messages), wrong)


def read_layers(
    raw: Mapping[str, Any],
    is_sliding: Callable[[int], bool],
    window: int | None,
    rope: Rope | None,
    local: Rope | None = None,
) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers that `layer_types` lists.

    If this key is missing, the layers `i` with `is_sliding(i)` have a window. Layers
    with a window have the rotary positions `local`, or `rope` if `local` is None.
    """
    types = read_layer_types(
        raw, (_SLIDING, _FULL), lambda i: _SLIDING if is_sliding(i) else _FULL
    )
    if _SLIDING in types and not is_count(window):
        raise ValueError(f"`sliding_window` must be positive. Got {window!r}.")
    sliding, full = LayerKind(local or rope, window), LayerKind(rope)
    return tuple(sliding if kind == _SLIDING else full for kind in types)


def read_layer_types(
    raw: Mapping[str, Any], choices: tuple[str, str], default: Callable[[int], str]
) -> list[str]:
    """Returns `layer_types`, or the types `default(i)` of the layers if it is missing.

    `choices` are the two types of layers that the family has.
    """
    count, types = raw["num_hidden_layers"], read_list(raw, "layer_types")
    if types is None:
        types = [default(i) for i in range(count)]
    if len(types) != count or {*types} - {*choices}:
        raise ValueError(
            f"`layer_types` must have {count} entries, and each must be {choices[0]!r} "
            f"or {choices[1]!r}. Got {types}."
        )
    return types


def read_rotary_flags(raw: Mapping[str, Any]) -> list[bool]:
    """Returns whether each layer has rotary positions.

    Despite its name, `no_rope_layers` has 1 for layers with rotary positions. If it is
    missing, every `no_rope_layer_interval`-th layer has none.
    """
    count, flags = raw["num_hidden_layers"], read_list(raw, "no_rope_layers")
    if flags is None:
        interval = read_count(raw, "no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(count)]
    if len(flags) < count:
        raise ValueError(
            f"`no_rope_layers` must have an entry for each of {count} layers. Got "
            f"{len(flags)}."
        )
    if wrong := [flag for flag in flags if flag not in (0, 1)]:
        raise ValueError(f"`no_rope_layers` must be 0 or 1. Got {wrong}.")
    return [bool(flag) for flag in flags[:count]]


def read_uniform_layers(
    raw: Mapping[str, Any], rope: Rope, default: int | None
) -> tuple[LayerKind, ...]:
    """Returns the only kind of layer of a model whose layers all have the same window.

    The window is `sliding_window`, or `default` if the key is missing. If it is null,
    the layers have no window.
    """
    window = raw.get("sliding_window", default)
    if window is not None and not is_count(window):
        raise ValueError(
            f"`sliding_window` must be a positive integer or null. Got {window!r}."
        )
    return (LayerKind(rope, window),)


def read_flag(raw: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Returns a value that must be true or false; null means false."""
    # Text would always be true, even "false". Some files have numbers as flags.
    value = raw.get(key, default)
    if not (value is None or isinstance(value, int | float)):
        raise ValueError(f"`{key}` must be true or false. Got {value!r}.")
    return bool(value)


def read_number(
    raw: Mapping[str, Any], key: str, default: float | None = None
) -> float:
    """Returns a value that must be a number, as a float."""
    if not is_number(value := raw.get(key, default)):
        raise ValueError(f"`{key}` must be a number. Got {value!r}.")
    return float(value)


def read_positive(raw: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a value that must be a positive number."""
    if not (value := read_number(raw, key, default)) > 0:
        raise ValueError(f"`{key}` must be positive. Got {value}.")
    return value


def read_optional(
    raw: Mapping[str, Any], key: str, default: float | None = None
) -> float | None:
    """Returns a value that must be a number or null, as a float or None."""
    is_null = raw.get(key, default) is None
    return None if is_null else read_number(raw, key, default)


def read_count(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Returns a value that must be a positive integer."""
    if not is_count(value := raw.get(key, default)):
        raise ValueError(f"`{key}` must be a positive integer. Got {value!r}.")
    return value


def read_size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Returns a value that must be 0 or a positive integer."""
    if type(size := raw.get(key, default)) is not int or not 0 <= size <= _MAX_COUNT:
        raise ValueError(f"`{key}` must be 0 or a positive integer. Got {size!r}.")
    return size


def read_list(raw: Mapping[str, Any], key: str) -> list[Any] | None:
    """Returns a value that must be a list, or None if it is missing or null."""
    if not isinstance(values := raw.get(key), list | tuple | None):
        raise ValueError(f"`{key}` must be a list. Got {values!r}.")
    return None if values is None else [*values]


def read_layer_numbers(raw: Mapping[str, Any], key: str) -> list[int] | None:
    """Returns a list of numbers of layers, or None if it is missing or null."""
    numbers = read_list(raw, key)
    if wrong := [x for x in numbers or () if type(x) is not int]:
        raise ValueError(f"`{key}` must be integers. Got {wrong}.")
    return numbers


def read_section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a value that must be an object; an empty one if missing or null."""
    if not isinstance(section := raw.get(key), Mapping | None):
        raise ValueError(f"`{key}` must be an object. Got {section!r}.")
    return section or {}


def is_count(value: object, largest: int = _MAX_COUNT) -> TypeGuard[int]:
    """Whether a value is a positive integer of plausible size."""
    return type(value) is int and 0 < value <= largest


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_float(value: object) -> float:
    """Returns a number as a float; raises for bools and text."""
    if not is_number(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


# Known keys of a rotary section, and numbers that must be positive if present.
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("original_max_position_embeddings", "attention_factor", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}
_ORIGINAL, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"
_POSITIVE = ("rope_theta", "factor", _LONGEST, _ORIGINAL, "low_freq_factor")
_POSITIVE += ("high_freq_factor", "beta_fast", "beta_slow", "attention_factor")


def read_rope(
    raw: Mapping[str, Any],
    dim: int,
    *,
    theta: float = 10_000.0,
    section: Mapping[str, Any] | None = None,
) -> Rope:
    """Reads `rope_parameters`, or `rope_scaling` in older files.

    `dim` is the number of values of a head that are rotated. `theta` is the family's
    default for `rope_theta`. If `section` is given, it is read instead of both keys.
    """
    # 1. The type.
    section = rope_section(raw) if section is None else section
    fraction = section.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if fraction not in (None, 1):
        raise ValueError(f"`partial_rotary_factor` must be 1. Got {fraction}.")
    kind = section.get("rope_type", section.get("type")) or "default"
    if kind not in _ROPE_TYPES:
        names = tuple(_ROPE_TYPES)
        raise ValueError(f"`rope_type` must be one of {names}. Got {kind!r}.")
    required, compute_fields = _ROPE_TYPES[kind]
    if missing := [key for key in required if section.get(key) is None]:
        raise ValueError(
            f'`rope_type` "{kind}" must come with {missing}. Got {section}.'
        )
    # 2. The numbers. If `factor` is missing, it is computed as the ratio of the two
    # context lengths. LongRoPE does not need it if there is an `attention_factor`.
    values = {**section, _LONGEST: raw.get(_LONGEST)}
    values["rope_theta"] = _first_present(
        section.get("rope_theta"), raw.get("rope_theta"), theta
    )
    values[_ORIGINAL] = _first_present(
        raw.get(_ORIGINAL), section.get(_ORIGINAL), raw.get(_LONGEST)
    )
    numbers = {
        key: read_number(values, key)
        for key in _POSITIVE
        if values.get(key) is not None
    }
    if wrong := {key: x for key, x in numbers.items() if not x > 0}:
        raise ValueError(f"{[*wrong]} must be positive. Got {wrong}.")
    alternatives = ("factor", "attention_factor", _LONGEST)
    has_lengths = _ORIGINAL in numbers and any(key in numbers for key in alternatives)
    if kind not in ("default", "linear") and not has_lengths:
        raise ValueError(
            f'`rope_type` "{kind}" must come with `max_position_embeddings`, or with '
            f"`original_max_position_embeddings` and `factor`. Got {section}."
        )
    theta = numbers["rope_theta"]
    # 3. The divisors. NumPy need not warn about numbers that are not finite, because
    # `DecoderConfig` rejects them.
    with np.errstate(all="ignore"):
        frequencies = theta ** (-np.arange(0, dim, 2) / dim)
        return Rope(theta, **compute_fields(values | numbers, frequencies))


def read_partial_rope(
    raw: Mapping[str, Any], head_dim: int, fraction: float
) -> tuple[Rope, int]:
    """Reads rotary positions that rotate only a part of each head.

    Returns them, and the size of the rotated part. `fraction` is the family's default
    for `partial_rotary_factor`.
    """
    section, key = dict(rope_section(raw)), "partial_rotary_factor"
    stored = _first_present(section.pop(key, None), raw.get(key), fraction)
    fraction = read_number({key: stored}, key)
    if (dim := int(head_dim * fraction)) < 2:
        raise ValueError(
            f"`{key}` must rotate at least one pair of the {head_dim} values of a "
            f"head. Got {fraction}."
        )
    return read_rope({**raw, key: None}, dim, section=section), dim


def rope_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the section of a config about rotary positions, or an empty one."""
    section = read_section(raw, "rope_scaling") or read_section(raw, "rope_parameters")
    if nested := [key for key, x in section.items() if isinstance(x, Mapping)]:
        raise ValueError(
            "`rope_parameters` must be the same for all layers. Got a section for each "
            f"of {nested}."
        )
    return section


def rope_sections(
    raw: Mapping[str, Any],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the rotary sections of layers without and with a window.

    Older files have the first one in `rope_scaling`, which overrides the newer key.
    """
    sections = read_section(raw, "rope_parameters")
    unknown = sorted(sections.keys() - {_FULL, _SLIDING})
    # If both sections are present, transformers ignores other keys.
    if unknown and not {_FULL, _SLIDING} <= sections.keys():
        raise ValueError(
            "`rope_parameters` must have a section for each kind of layers. Got the "
            f"keys {unknown}."
        )
    full, sliding = (read_section(sections, key) for key in (_FULL, _SLIDING))
    return {**full, **read_section(raw, "rope_scaling")}, sliding


def _first_present(*values: Any) -> Any:
    """Returns the first value that is not null, or None."""
    return next((value for value in values if value is not None), None)


def _linear(values, frequencies) -> dict[str, Any]:
    return {"divisors": (values["factor"],) * len(frequencies)}


def _llama3(values, frequencies) -> dict[str, Any]:
    """Llama 3.1: divides slow frequencies by `factor`, and keeps fast ones."""
    # `factor` divides the frequencies of pairs with fewer than `low` rotations in the
    # original context. Pairs with more than `high` rotations keep their frequencies,
    # and the frequencies of the pairs in between are interpolated.
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    rotations = values[_ORIGINAL] * frequencies / (2 * np.pi)
    unchanged = np.clip((rotations - low) / (high - low), 0, 1)
    divisors = 1 / (unchanged + (1 - unchanged) / values["factor"])
    return {"divisors": tuple(divisors.tolist())}


def _yarn(values, frequencies) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071): divisors that grow with the pair index, and a scale."""
    half, original = len(frequencies), values[_ORIGINAL]
    factor = values.get("factor") or values[_LONGEST] / original

    def find_pair(rotations: float) -> float:
        """Returns the pair that rotates this often within the original context."""
        position = original / (rotations * 2 * math.pi)
        return half * math.log(position) / math.log(values["rope_theta"])

    # 1. The ramp. Pairs that rotate more than `beta_fast` times keep their frequency.
    # The frequencies of pairs that rotate less than `beta_slow` times are divided by
    # the factor, and those of the pairs in between are interpolated.
    low = find_pair(values.get("beta_fast") or 32)
    high = find_pair(values.get("beta_slow") or 1)
    if read_flag(values, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = (high - low) or 0.001
    stretched = np.clip((np.arange(half) - low) / width, 0, 1)
    divisors = 1 / (stretched / factor + (1 - stretched))

    # 2. The scale of q and k: sqrt(1 / t), where t is the temperature in the paper.
    def compute_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    scale = values.get("attention_factor")
    if scale is None:
        scale = compute_scale(1)
        keys = ("mscale", "mscale_all_dim")
        mscale, mscale_all = (read_optional(values, key) for key in keys)
        if mscale and mscale_all:
            scale = compute_scale(mscale) / compute_scale(mscale_all)
    return {
        "divisors": tuple(divisors.tolist()),
        "original_length": int(original),
        "scale": scale,
    }


def _longrope(values, frequencies) -> dict[str, Any]:
    """LongRoPE (arXiv:2402.13753): divisors for short and for long sequences."""
    half, original = len(frequencies), values[_ORIGINAL]

    def read_divisors(key: str) -> tuple[float, ...]:
        divisors = read_list(values, key) or ()
        if len(divisors) != half:
            raise ValueError(f"`{key}` must have {half} values. Got {len(divisors)}.")
        if wrong := [x for x in divisors if not is_number(x)]:
            raise ValueError(f"`{key}` must be numbers. Got {wrong}.")
        return tuple(map(float, divisors))

    short_divisors, long_divisors = map(read_divisors, ("short_factor", "long_factor"))
    scale = values.get("attention_factor")
    if scale is None:
        factor = values.get("factor") or values[_LONGEST] / original
        log = math.log(factor) / math.log(original)
        scale = math.sqrt(1 + log) if factor > 1 else 1.0
    return {
        "divisors": short_divisors,
        "long_divisors": long_divisors,
        "original_length": int(original),
        "scale": scale,
    }


# For each `rope_type`: the keys that it requires, and the function that computes fields
# of `Rope` from them.
_ROPE_TYPES: dict[str, tuple[tuple[str, ...], Callable[..., dict[str, Any]]]] = {
    "default": ((), lambda values, frequencies: {}),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": ((), _yarn),
    "longrope": (("short_factor", "long_factor"), _longrope),
}
