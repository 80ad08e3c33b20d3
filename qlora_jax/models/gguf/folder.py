"""Writes the config and the tokenizer of a GGUF file as Hugging Face files."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from ..config import DecoderConfig, Rope
from ..families import FAMILIES, config_from_hf
from .decoder_in import context_of, read_gguf
from .open_file import field, open_gguf
from .tokenizer_in import chat_templates, gguf_tokenizer, special_tokens
from .values import OSS, architecture_of


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
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        yield folder


def hf_config(config: DecoderConfig, context: int) -> dict[str, Any]:
    """Returns the `config.json` of a decoder that a GGUF file can hold."""
    c, kind = config, architecture_of(config)
    model_type = _MODEL_TYPES.get((kind, c.experts is not None), kind)
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
        # gpt-oss always has these biases, and no key for them.
        **({} if model_type == "gpt_oss" else {"mlp_bias": c.mlp_bias}),
        **_OWN.get(model_type, _rope)(c),
    }
    if config_from_hf(raw) != config:
        raise ValueError(
            "a GGUF model must be one that a Hugging Face config can say. This "
            f"{kind} is none: a GGUF file holds stretched rotary positions, as an "
            "example, without the rule that made them."
        )
    return raw


def _rope(c: DecoderConfig) -> dict[str, Any]:
    """Returns `rope_parameters` for Transformers 5, and the older `rope_theta`."""
    rope = c.ropes[0] or c.ropes[1]
    assert rope is not None
    return {"rope_theta": rope.theta, "rope_parameters": _section(rope)}


def _section(rope: Rope) -> dict[str, Any]:
    theta = {"rope_theta": rope.theta}
    if not rope.divisors:
        return theta | {"rope_type": "default"}
    return theta | {"rope_type": "linear", "factor": rope.divisors[0]}


def _alternating(c: DecoderConfig) -> dict[str, Any]:
    window = next(layer.window for layer in c.layers if layer.window is not None)
    sliding, full = "sliding_attention", "full_attention"
    types = [full if x.window is None else sliding for x in c.layers]
    return {"sliding_window": window, "layer_types": types}


def _gemma(c: DecoderConfig) -> dict[str, Any]:
    return _alternating(c) | {
        "hidden_activation": c.activation,
        "query_pre_attn_scalar": round(c.attention_scale**-2),
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.logit_soft_cap,
    }


def _gemma3(c: DecoderConfig) -> dict[str, Any]:
    ropes = {layer.window is None: layer.rope or Rope() for layer in c.layers}
    full, sliding = ropes.get(True, Rope(1e6)), ropes.get(False, Rope())
    return _gemma(c) | {
        "rope_theta": full.theta,
        "rope_local_base_freq": sliding.theta,
        "rope_parameters": {
            "full_attention": _section(full),
            "sliding_attention": _section(sliding),
        },
    }


def _experts(c: DecoderConfig, count: str = "num_local_experts") -> dict[str, Any]:
    assert c.experts is not None
    own = {count: c.experts.count, "num_experts_per_tok": c.experts.per_token}
    return _rope(c) | own


def _normalized(c: DecoderConfig) -> dict[str, Any]:
    assert c.experts is not None
    return _experts(c, "num_experts") | {"norm_topk_prob": c.experts.normalized}


def _qwen3_moe(c: DecoderConfig) -> dict[str, Any]:
    return _normalized(c) | {"moe_intermediate_size": c.intermediate_size}


def _phi3(c: DecoderConfig) -> dict[str, Any]:
    (layer,) = set(c.layers)
    rope = layer.rope or Rope()
    long = {
        "rope_type": "longrope",
        "short_factor": list(rope.divisors),
        "long_factor": list(rope.long_divisors),
        "attention_factor": rope.scale,
    }
    section = {"rope_type": "default"} | (long if rope.divisors else {})
    original = {"original_max_position_embeddings": rope.original_length}
    share = {"partial_rotary_factor": c.rotary_dim / c.head_dim}
    return {
        "sliding_window": layer.window,
        "rope_theta": rope.theta,
        "rope_parameters": section | {"rope_theta": rope.theta} | share,
        **(original if rope.original_length else {}),
        **share,
    }


def _gpt_oss(c: DecoderConfig) -> dict[str, Any]:
    rope = c.ropes[0]
    assert rope is not None
    section = _section(rope)
    if rope.original_length:
        section |= {"rope_type": "yarn", "factor": rope.divisors[-1]}
        section["original_max_position_embeddings"] = rope.original_length
        section["truncate"] = False
    own = {"hidden_act": "silu", "rope_parameters": section}
    return _alternating(c) | _experts(c) | own


# By architecture, and whether it is a mixture of experts.
_MODEL_TYPES = {("gemma3", False): "gemma3_text", ("qwen3moe", True): "qwen3_moe"}
_MODEL_TYPES |= {("llama", True): "mixtral", (OSS, True): "gpt_oss"}
_OWN = {
    "gemma2": lambda c: _gemma(c) | _rope(c),
    "gemma3_text": _gemma3,
    "smollm3": lambda c: (
        _rope(c) | {"no_rope_layers": [int(x.rope is not None) for x in c.layers]}
    ),
    "phi3": _phi3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _experts,
    "olmoe": _normalized,
    "gpt_oss": _gpt_oss,
}


def _tokenizer_config(
    reader: Any, tokenizer: Any, special: dict[str, int]
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
