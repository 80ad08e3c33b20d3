"""Converts llama.cpp's metadata values to a `config.json` and a `DecoderConfig`."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from ..models.config import DecoderConfig, LayerKind
from ..models.families import FAMILIES, config_from_hf
from ..models.family import is_count, to_float

# Names of the tensors that contain `Rope.divisors` and `Rope.long_divisors`.
FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
OSS = "gpt-oss"
# llama.cpp reorders the rows of q and k in these architectures.
PERMUTED = ("llama", "smollm3")
QWEN3_5 = ("qwen35", "qwen35moe")  # which are written, but not read
# Architectures whose norms are stored as 1 + scale.
OFFSET_NORMS = ("gemma", "gemma2", "gemma3", *QWEN3_5)
# llama.cpp reads no head in these architectures.
ALWAYS_TIED = ("gemma", "gemma2")
# Architectures in which a part of each head may be rotated.
PARTLY_ROTATED = ("phi3", *QWEN3_5)
# The optional biases that llama.cpp reads, by architecture. Each is a field of
# `DecoderConfig` that is true if the file has the tensor named in `BIAS_TENSORS`.
_BIASES = {"llama": ("qkv_bias", "o_bias", "mlp_bias"), "qwen2": ("qkv_bias",)}
BIAS_TENSORS = {
    "qkv_bias": "blk.0.attn_q.bias",
    "o_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_gate.bias",
}
# The required keys of sizes: `_SIZE_KEYS` has them by field of `DecoderConfig`, and
# `EXPERT_KEYS` by field of `Experts`.
_SIZE_KEYS = {
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
}
EXPERT_KEYS = {"count": "expert_count", "per_token": "expert_used_count"}
# The sizes of a gated delta rule, by key of `config.json`.
DELTA_RULE_KEYS = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
# Architectures that always have experts. Mixtral is stored as a "llama" with experts.
_MIXTURES = ("qwen3moe", "qwen35moe", OSS, "olmoe")
# Hugging Face's model types, where llama.cpp's names differ.
_MODEL_TYPES = {"mistral": "llama", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text"}
_MODEL_TYPES |= {OSS: "gpt_oss", "qwen35": "qwen3_5_text"}
_MODEL_TYPES |= {"qwen35moe": "qwen3_5_moe_text"}
# Gemma's 27B models are recognized by their number of layers. These models scale
# attention scores by `(hidden_size // num_heads) ** -0.5`.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# Architectures with windows: the last layer of each such period has none.
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, OSS: 2}
_NO_ROPE_PERIOD = 4  # every 4th layer of SmolLM3 has no rotary positions
# Further YaRN keys, with the only values that are supported.
_YARN_KEYS = {"beta_fast": 32, "beta_slow": 1, "ext_factor": 1, "attn_factor": 1}

Values = Mapping[str, Any]  # metadata values by key, without the architecture's name
Divisors = Mapping[str, tuple[float, ...]]  # of frequencies, by tensor name


def size_keys(architecture: str) -> dict[str, str]:
    """Returns the metadata key of each field of `DecoderConfig` that is a size."""
    if architecture not in ("qwen3moe", "qwen35moe", OSS):
        return _SIZE_KEYS
    return _SIZE_KEYS | {"intermediate_size": "expert_feed_forward_length"}


def _is_mixture(architecture: str, values: Values) -> bool:
    has_experts = architecture == "llama" and bool(values.get("expert_count"))
    return architecture in _MIXTURES or has_experts


def _hf_config(
    architecture: str,
    values: Values,
    names: Collection[str],
    vocab_size: int,
    divisors: Divisors,
) -> dict[str, Any]:
    get, is_mixture = values.get, _is_mixture(architecture, values)
    biases = _find_biases(architecture, names)
    model_type = _MODEL_TYPES.get(architecture, architecture)
    if architecture == "llama" and is_mixture:
        model_type = "mixtral"
    family = FAMILIES[model_type]
    # Here and below, missing values get llama.cpp's defaults.
    width, heads = values["embedding_length"], values["attention.head_count"]
    head_dim = get("attention.key_length", width // heads)
    has_head = "output.weight" in names or architecture in (OSS, "olmoe")
    raw = {
        "architectures": list(family.architectures),
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": values[size_keys(architecture)["intermediate_size"]],
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": _activation(architecture),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": to_float(get("attention.layer_norm_rms_epsilon", 1e-5)),
        "tie_word_embeddings": not has_head or architecture in ALWAYS_TIED,
        **_rope_keys(architecture, values, head_dim, divisors),
    }
    optional = _family_keys(architecture, values, head_dim)
    # In gpt-oss, all projections have biases. Its config has no key for those of MLPs.
    optional["attention_bias"] = architecture == OSS or biases.get("qkv_bias", False)
    optional["mlp_bias"] = biases.get("mlp_bias", False)
    if is_mixture:
        has_local_key = model_type in ("mixtral", "gpt_oss")
        key = "num_local_experts" if has_local_key else "num_experts"
        optional[key] = get("expert_count")
    keys = family.keys.split()
    return raw | {key: value for key, value in optional.items() if key in keys}


def _find_biases(architecture: str, names: Collection[str]) -> dict[str, bool]:
    """Returns whether a file has each of the optional biases in `_BIASES`."""
    fields = _BIASES.get(architecture, ())
    return {field: BIAS_TENSORS[field] in names for field in fields}


def _activation(architecture: str) -> str:
    return "gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu"


def _family_keys(architecture: str, values: Values, head_dim: int) -> dict[str, Any]:
    """Returns the keys of a `config.json` that only some families read."""
    get, num_layers = values.get, values["block_count"]
    is_27b = num_layers == _LAYERS_OF_27B.get(architecture)
    scaled_dim = values["embedding_length"] // values["attention.head_count"]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    is_capped = architecture == "gemma2"
    keys: dict[str, Any] = {
        **{k: to_float(get(k, cap)) if is_capped else None for k, cap in caps.items()},
        "hidden_activation": _activation(architecture),
        "query_pre_attn_scalar": scaled_dim if is_27b else head_dim,
        "moe_intermediate_size": get("expert_feed_forward_length"),
        # Despite its name, this key has 1 for layers with rotary positions.
        "no_rope_layers": [
            int((layer + 1) % _NO_ROPE_PERIOD > 0) for layer in range(num_layers)
        ],
        "num_experts_per_tok": get("expert_used_count"),
        "norm_topk_prob": architecture != "olmoe",
    }
    if architecture in QWEN3_5:
        keys |= {hf_key: get(key) for hf_key, key in DELTA_RULE_KEYS.items()}
        value_dim = values["ssm.inner_size"] // values["ssm.time_step_rank"]
        keys["linear_value_head_dim"] = value_dim
        keys["full_attention_interval"] = get("full_attention_interval")
        shared_width = get("expert_shared_feed_forward_length")
        keys["shared_expert_intermediate_size"] = shared_width
    if architecture == "phi3":
        keys["sliding_window"] = get("attention.sliding_window") or None
    elif default := WINDOW_PERIODS.get(architecture):
        period = get("attention.sliding_window_pattern", default)
        keys["layer_types"] = [
            "full_attention" if layer % period == period - 1 else "sliding_attention"
            for layer in range(num_layers)
        ]
        keys["sliding_window"] = get("attention.sliding_window", 4096)
    return keys


def _rope_keys(
    architecture: str, values: Values, head_dim: int, divisors: Divisors
) -> dict[str, Any]:
    """Returns the keys of a `config.json` about rotary positions.

    transformers 5 reads `rope_parameters`; older versions read the other keys.
    """
    get = values.get
    theta = to_float(get("rope.freq_base", 10_000.0))
    keys: dict[str, Any] = {"rope_theta": theta}
    parameters: dict[str, Any] = dict(keys)
    original = get("rope.scaling.original_context_length", get("context_length"))
    factor, kind = _rope_factor(values), "default"
    if architecture in PARTLY_ROTATED:
        rotary_dim = get("rope.dimension_count", head_dim)
        fraction = rotary_dim / head_dim
        if int(head_dim * fraction) < rotary_dim:  # readers round this product down
            fraction = math.nextafter(fraction, 1.0)
        keys["partial_rotary_factor"] = parameters["partial_rotary_factor"] = fraction
    if architecture == "phi3":
        if LONG in divisors:
            keys["original_max_position_embeddings"] = int(original)
        if divisors:
            kind = "longrope"
            parameters |= {
                "short_factor": list(divisors.get(SHORT, ())),
                "long_factor": list(divisors.get(LONG, ())),
                "attention_factor": to_float(get("rope.scaling.attn_factor", 1.0)),
            }
    elif get("rope.scaling.type") == "yarn":
        kind = "yarn"
        parameters |= {"original_max_position_embeddings": original, "truncate": False}
        parameters["factor"] = factor
    elif factor != 1:
        kind, parameters["factor"] = "linear", factor
    parameters["rope_type"] = kind
    if architecture == "gemma3":
        local = to_float(get("rope.freq_base_swa", 10_000.0))
        keys["rope_local_base_freq"] = local
        sliding = {"rope_theta": local, "rope_type": "default"}
        parameters = {"full_attention": parameters, "sliding_attention": sliding}
    return keys | {"rope_parameters": parameters}


def _rope_factor(values: Values) -> float:
    """Returns the factor by which all positions are divided."""
    get = values.get
    if get("rope.scaling.type") == "none":
        return 1.0
    return to_float(get("rope.scaling.factor", get("rope.scale_linear", 0.0))) or 1.0


def config_from_values(
    architecture: str,
    values: Values,
    names: Collection[str],
    vocab_size: int,
    divisors: Divisors,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the decoder that llama.cpp builds from metadata values.

    Also returns its `config.json`. `names` are the names of the file's tensors.
    """
    raw = _hf_config(architecture, values, names, vocab_size, divisors)
    config = config_from_hf(raw)
    # A `config.json` has no keys for some settings, which are therefore changed here:
    # the kinds of biases that exist, a divisor for each frequency, and a `Rope.scale`
    # without LongRoPE.
    changes: Any = _find_biases(architecture, names)
    rope_changes: dict[str, Any] = {}
    if architecture == "phi3":
        rope_changes["scale"] = to_float(values.get("rope.scaling.attn_factor", 1.0))
    elif FREQUENCIES in divisors and values.get("rope.scaling.type") != "yarn":
        factor = _rope_factor(values)  # divides the frequencies too
        rope_changes["divisors"] = tuple(factor * x for x in divisors[FREQUENCIES])

    def change_rope(layer: LayerKind) -> LayerKind:
        is_local = architecture == "gemma3" and layer.window is not None
        if layer.rope is None or is_local:
            return layer
        rope = dataclasses.replace(layer.rope, **rope_changes)
        return dataclasses.replace(layer, rope=rope)

    layers = tuple(map(change_rope, config.layers))
    return dataclasses.replace(config, layers=layers, **changes), raw


def check_values(architecture: str, values: Values, names: Collection[str]) -> None:
    """Raises a ValueError for missing values and values that are not supported."""
    # 1. Required keys, and optional keys that must be counts if they are present.
    get = values.get
    required = [*size_keys(architecture).values()]
    required += EXPERT_KEYS.values() if _is_mixture(architecture, values) else ()
    optional = ["attention.head_count_kv", "attention.key_length"]
    optional += ["rope.dimension_count"]
    if architecture in WINDOW_PERIODS:
        optional += ["attention.sliding_window_pattern"]
        if architecture == "gemma2":  # the only one with a default for the window
            optional += ["attention.sliding_window"]
        else:
            required += ["attention.sliding_window"]
    missing = [key for key in required if not is_count(get(key))]
    missing += [key for key in optional if not is_count(get(key, 1))]
    missing = [f"{architecture}.{key}" for key in missing]
    # Each layer has at least one tensor, so a file with fewer tensors than layers is
    # damaged. A huge number of layers would make later code use up all memory.
    if not is_count(get("block_count"), len(names)):
        missing = [f"{architecture}.block_count of at most {len(names)}"]
    if "token_embd.weight" not in names:
        missing += ["token_embd.weight"]
    if missing:
        raise ValueError(f"a GGUF model must have {', '.join(missing)}.")
    # 2. Keys that may be missing, and for which few values are supported. Without this
    # check, other values would give a different model without an error.
    default_dim = values["embedding_length"] // values["attention.head_count"]
    head_dim = get("attention.key_length", default_dim)
    supported = {
        "rope.scaling.type": ("none", "linear"),
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "expert_weights_scale": (1, 0),
    }
    if architecture not in PARTLY_ROTATED:
        supported["rope.dimension_count"] = (head_dim,)
    if architecture != "phi3":
        supported["rope.scaling.attn_factor"] = (1,)
    if architecture not in ("phi3", *WINDOW_PERIODS):
        supported["attention.sliding_window"] = (0,)
    if architecture == "gemma3":
        supported["final_logit_softcapping"] = (0,)
    if architecture == OSS:
        supported["rope.scaling.type"] += ("yarn",)
        supported["rope.freq_base_swa"] = (get("rope.freq_base"),)
        supported |= {f"rope.scaling.yarn_{key}": (x,) for key, x in _YARN_KEYS.items()}
    if wrong := [
        f"`{architecture}.{key}` must be {' or '.join(map(repr, allowed))}. "
        f"Got {value!r}."
        for key, allowed in supported.items()
        if (value := get(key, allowed[0])) not in allowed
    ]:
        raise ValueError(" ".join(wrong))
