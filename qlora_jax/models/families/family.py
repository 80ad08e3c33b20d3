"""The record of a model family, and helpers to read configs."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..config import DecoderConfig, Experts, LayerKind, Rope

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Other keys that each family reads.
_READ = """
architectures head_dim is_causal max_position_embeddings model_type
num_key_value_heads original_max_position_embeddings partial_rotary_factor
per_layer_config rms_norm_eps rope_parameters rope_scaling rope_theta
tie_word_embeddings
"""
# Keys that do not change a trained model's logits: of files, tokens, training,
# generation and classifiers, and those of other programs.
HARMLESS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path
    add_cross_attention attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    cls_token_id cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_sequence_length min_length model_max_length model_name no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads quantization quantization_config remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_jitter_noise sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
EXPERT_KEYS = """
num_experts num_local_experts num_experts_per_tok output_router_logits
router_aux_loss_coef
"""
WINDOW_KEYS = "layer_types sliding_window"
# Keys that published files carry with the value that means what all models compute.
_NEUTRAL = {
    "attention_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "use_mrope": False,
}
_MOST_LAYERS, _LARGEST_HEAD = 10_000, 1 << 16  # no model comes near
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its names elsewhere, and how to read its config."""

    model_type: str  # in `config.json`
    architectures: tuple[str, ...]  # classes of transformers
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    keys: str  # of `config.json`, besides those that each family reads

    def unknown_keys(self, raw: Mapping[str, Any]) -> list[str]:
        """Returns the keys of a `config.json` that may count and are not read."""
        known = {*_SIZES, *_READ.split(), *self.keys.split(), *HARMLESS_KEYS}
        return sorted(
            key
            for key, value in raw.items()
            if key not in known and value not in (None, _NEUTRAL.get(key))
        )


def shared_fields(
    raw: Mapping[str, Any],
    *,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    activation: tuple[str, str] = ("hidden_act", "silu"),
) -> dict[str, Any]:
    """Returns the fields of `DecoderConfig` that all families read alike.

    Settings are the family's values for missing keys. `activation` is the key of the
    activation, and the value that it must have.
    """
    limits = {"num_hidden_layers": _MOST_LAYERS}
    wrong = [k for k in _SIZES if not is_count(raw.get(k), limits.get(k, 1 << 31))]
    keys = ("head_dim", "num_key_value_heads")
    optional = [key for key in keys if raw.get(key) is not None]
    if wrong := wrong + [k for k in optional if not is_count(raw[k])]:
        got = {key: raw.get(key) for key in wrong}
        raise ValueError(f"{wrong} must be positive integers. Got {got}.")
    key, value = activation
    require(raw, {key: value, "per_layer_config": None, "is_causal": True})
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    size = raw.get("head_dim", head_dim) or width // heads
    if not is_count(size, _LARGEST_HEAD):
        raise ValueError(f"`head_dim` must be from 1 to {_LARGEST_HEAD}. Got {size}.")
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": width,
        "intermediate_size": raw["intermediate_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads", kv_heads) or heads,
        "head_dim": size,
        "activation": value,
        "rms_norm_eps": number(raw.get("rms_norm_eps", eps)),
        "tie_embeddings": bool(raw.get("tie_word_embeddings", tied)),
    }


def biases(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which projections have biases, as most families read them."""
    of_attention = bool(raw.get("attention_bias", False))
    return {"qkv_bias": of_attention, "o_bias": of_attention}


def read_experts(
    raw: Mapping[str, Any],
    count: int,
    per_token: int,
    *,
    factor: float = 0.001,
    **settings: Any,
) -> Experts:
    """Returns the mixture of experts, with the family's values for missing keys.

    `factor` is that of the loss that balances experts, which is off by default.
    """
    given = number(raw.get("router_aux_loss_coef", factor))
    return Experts(
        raw.get("num_experts", raw.get("num_local_experts", count)),
        raw.get("num_experts_per_tok", per_token),
        balance=given if raw.get("output_router_logits", False) else 0.0,
        **settings,
    )


def require(raw: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses a config in which keys have other values; they may be missing."""
    if wrong := [
        f"`{key}` must be {json.dumps(value)}. Got {raw[key]!r}."
        for key, value in values.items()
        if key in raw and raw[key] != value
    ]:
        raise ValueError(" ".join(wrong))


def read_layers(
    raw: Mapping[str, Any],
    is_sliding: Callable[[int], bool],
    window: Any,
    rope: Rope,
    local: Rope | None = None,
) -> tuple[LayerKind, ...]:
    """Returns the kinds of layers that `layer_types` lists.

    Where it is missing, `is_sliding` tells by the index of a layer. Sliding layers have
    the `window`, and the rotary positions `local` if those differ.
    """
    count, types = raw["num_hidden_layers"], raw.get("layer_types")
    if types is None:
        types = [_SLIDING if is_sliding(i) else _FULL for i in range(count)]
    if (got := len(types)) != count:
        raise ValueError(f"`layer_types` must have {count} entries. Got {got}.")
    if unknown := sorted(set(types) - {_SLIDING, _FULL}):
        raise ValueError(
            f'`layer_types` must be "{_SLIDING}" or "{_FULL}". Got {unknown}.'
        )
    if _SLIDING in types and not is_count(window):
        raise ValueError(f"`sliding_window` must be positive. Got {window!r}.")
    sliding, full = LayerKind(local or rope, window), LayerKind(rope)
    return tuple(sliding if kind == _SLIDING else full for kind in types)


def one_window(raw: Mapping[str, Any], rope: Rope, default: int | None):
    """Returns layers that all have the window `sliding_window`, if not null."""
    window = raw.get("sliding_window", default)
    if window is not None and not is_count(window):
        raise ValueError(
            f"`sliding_window` must be a positive integer or null. Got {window!r}."
        )
    return (LayerKind(rope, window),)


def is_count(value: Any, largest: int = 1 << 31) -> bool:
    """Whether a value is a positive integer of plausible size."""
    return type(value) is int and 0 < value <= largest


def number(value: Any) -> float:
    """Returns a number as a float; refuses bools and text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)
