"""Writes the config and the tokenizer of a GGUF file as Hugging Face files."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..models.config import DecoderConfig, Rope
from ..models.families import FAMILIES, config_from_hf
from .decoder_in import context_of, read_gguf
from .open_file import field, open_gguf
from .tokenizer_in import chat_templates, gguf_tokenizer, special_tokens
from .values import OSS, architecture_of

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer


@contextlib.contextmanager
def folder_of_gguf(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary Hugging Face folder of a GGUF file, without weights."""
    path = pathlib.Path(path)
    config, _ = read_gguf(path)
    reader = open_gguf(path)
    special, ends = special_tokens(reader)
    ids: dict[str, Any] = {f"{name}_id": index for name, index in special.items()}
    eos = {"eos_token_id": ends if ends[1:] else ends[0]} if ends else {}
    files: dict[str, Any] = {
        "config.json": hf_config(config, context_of(path)) | ids,
        "generation_config.json": ids | eos,
    }
    tokenizer = None
    if field(reader, "tokenizer.ggml.model") is not None:
        tokenizer = gguf_tokenizer(path)
        files["tokenizer_config.json"] = _tokenizer_config(reader, tokenizer, special)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        yield folder


def _tokenizer_config(
    reader: "GGUFReader", tokenizer: "Tokenizer", special: dict[str, int]
) -> dict[str, Any]:
    templates: Any = chat_templates(reader)
    if [*templates] == ["default"]:
        templates = templates["default"]
    else:
        templates = [{"name": n, "template": x} for n, x in templates.items()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.id_to_token(index) for name, index in special.items()},
        **({"chat_template": templates} if templates else {}),
    }


def hf_config(config: DecoderConfig, context: int) -> dict[str, Any]:
    """Returns a `config.json` for a decoder from a GGUF file."""
    c, architecture = config, architecture_of(config)
    is_mixture = c.experts is not None
    model_type = _MODEL_TYPES.get((architecture, is_mixture), architecture)
    raw = {
        "architectures": list(FAMILIES[model_type].architectures),
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": c.activation,
        "max_position_embeddings": context,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.o_bias,
        # gpt-oss always has these biases, but its config has no key for them.
        **({} if model_type == "gpt_oss" else {"mlp_bias": c.mlp_bias}),
        **_FAMILY_KEYS.get(model_type, _rope_keys)(c),
    }
    if config_from_hf(raw) != config:
        raise ValueError(
            "a GGUF model must have an equivalent Hugging Face config. This "
            f"{architecture} has none. For example, a GGUF file has the frequencies of "
            "an extended context, but not the rule that produced them."
        )
    return raw


# Each function below returns a family's keys besides those that all families share.


def _rope_keys(c: DecoderConfig) -> dict[str, Any]:
    rope = c.ropes[0] or c.ropes[1]  # None for some layers of SmolLM3
    assert rope is not None
    # transformers 5 reads `rope_parameters`, older versions `rope_theta`.
    return {"rope_theta": rope.theta, "rope_parameters": _rope_section(rope)}


def _rope_section(rope: Rope) -> dict[str, Any]:
    theta = {"rope_theta": rope.theta}
    if not rope.divisors:
        return theta | {"rope_type": "default"}
    return theta | {"rope_type": "linear", "factor": rope.divisors[0]}


def _window_keys(c: DecoderConfig) -> dict[str, Any]:
    window = next(layer.window for layer in c.layers if layer.window is not None)
    sliding, full = "sliding_attention", "full_attention"
    types = [full if layer.window is None else sliding for layer in c.layers]
    return {"sliding_window": window, "layer_types": types}


def _gemma2_keys(c: DecoderConfig) -> dict[str, Any]:
    return _rope_keys(c) | _gemma_keys(c)


def _gemma_keys(c: DecoderConfig) -> dict[str, Any]:
    return _window_keys(c) | {
        "hidden_activation": c.activation,
        "query_pre_attn_scalar": round(c.attention_scale**-2),
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.logit_soft_cap,
    }


def _gemma3_keys(c: DecoderConfig) -> dict[str, Any]:
    ropes = {layer.window is None: layer.rope or Rope() for layer in c.layers}
    full, sliding = ropes.get(True, Rope(1e6)), ropes.get(False, Rope())
    return _gemma_keys(c) | {
        "rope_theta": full.theta,
        "rope_local_base_freq": sliding.theta,
        "rope_parameters": {
            "full_attention": _rope_section(full),
            "sliding_attention": _rope_section(sliding),
        },
    }


def _smollm3_keys(c: DecoderConfig) -> dict[str, Any]:
    # Despite its name, `no_rope_layers` has 1 for layers with rotary positions.
    has_rope = [int(layer.rope is not None) for layer in c.layers]
    return _rope_keys(c) | {"no_rope_layers": has_rope}


def _phi3_keys(c: DecoderConfig) -> dict[str, Any]:
    (layer,) = set(c.layers)
    rope = layer.rope or Rope()
    fraction = {"partial_rotary_factor": c.rotary_dim / c.head_dim}
    section = {"rope_type": "default"}
    if rope.divisors:
        section = {
            "rope_type": "longrope",
            "short_factor": list(rope.divisors),
            "long_factor": list(rope.long_divisors),
            "attention_factor": rope.scale,
        }
    keys = {
        "sliding_window": layer.window,
        "rope_theta": rope.theta,
        "rope_parameters": section | {"rope_theta": rope.theta} | fraction,
    }
    if rope.original_length:
        keys["original_max_position_embeddings"] = rope.original_length
    return keys | fraction


def _expert_keys(c: DecoderConfig, count: str = "num_local_experts") -> dict[str, Any]:
    assert c.experts is not None
    experts = {count: c.experts.count, "num_experts_per_tok": c.experts.per_token}
    return _rope_keys(c) | experts


def _olmoe_keys(c: DecoderConfig) -> dict[str, Any]:
    assert c.experts is not None
    return _expert_keys(c, "num_experts") | {"norm_topk_prob": c.experts.normalized}


def _qwen3_moe_keys(c: DecoderConfig) -> dict[str, Any]:
    return _olmoe_keys(c) | {"moe_intermediate_size": c.intermediate_size}


def _gpt_oss_keys(c: DecoderConfig) -> dict[str, Any]:
    rope = c.ropes[0]
    assert rope is not None
    section = _rope_section(rope)
    if rope.original_length:
        section |= {"rope_type": "yarn", "factor": rope.divisors[-1]}
        section["original_max_position_embeddings"] = rope.original_length
        section["truncate"] = False
    fixed = {"hidden_act": "silu", "rope_parameters": section}
    return _window_keys(c) | _expert_keys(c) | fixed


# The model type by architecture and whether there are experts. Other architectures have
# the same name as their model type.
_MODEL_TYPES = {
    ("gemma3", False): "gemma3_text",
    ("qwen3moe", True): "qwen3_moe",
    ("llama", True): "mixtral",
    (OSS, True): "gpt_oss",
}
_FAMILY_KEYS = {
    "gemma2": _gemma2_keys,
    "gemma3_text": _gemma3_keys,
    "smollm3": _smollm3_keys,
    "phi3": _phi3_keys,
    "qwen3_moe": _qwen3_moe_keys,
    "mixtral": _expert_keys,
    "olmoe": _olmoe_keys,
    "gpt_oss": _gpt_oss_keys,
}
