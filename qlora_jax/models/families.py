"""The families that the decoder computes: their configs and names elsewhere.

Elsewhere is Hugging Face (`config.json`, safetensors) and GGUF. Tensors have their
Hugging Face names here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .decoder import DecoderConfig

# Hugging Face name, GGUF name, path in the parameters; the first three are not stacked.
_TOP = [
    ("model.embed_tokens.weight", "token_embd.weight", "embed_tokens/embedding"),
    ("model.norm.weight", "output_norm.weight", "norm/scale"),
    ("lm_head.weight", "output.weight", "lm_head/kernel"),
]
_NORMS = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
]
_LINEAR = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
]
_FAMILIES = ("llama", "mistral", "qwen2")


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Reads a `config.json`.

    Raises:
        ValueError: If the family, or an option of it, is not one we compute.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32,
        ...     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        >>> config_from_hf(raw).num_kv_heads
        4
    """
    family = raw.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"`model_type` must be one of {_FAMILIES}. Got {family!r}.")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f'`hidden_act` must be "silu". Got {raw["hidden_act"]!r}.')
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    if window and window < raw.get("max_position_embeddings", math.inf):
        raise ValueError(f"`sliding_window` must be null. Got {window}.")
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(theta),
        rope_divisors=_rope_divisors(rope, float(theta), head_dim),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family == "llama",
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _rope_divisors(rope: Mapping[str, Any], theta: float, head_dim: int):
    """Llama 3.1's stretch: slow frequencies by `factor`, fast ones not at all."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3":
        raise ValueError(f'`rope_type` must be "default" or "llama3". Got {kind!r}.')
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequency = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return tuple(float(v) for v in 1 / (keep + (1 - keep) / rope["factor"]))


def gguf_field(reader: Any, key: str, default: Any = None) -> Any:
    """Returns what a field of a `gguf.GGUFReader` holds, or the default."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def config_from_gguf(reader: Any, known: Mapping, divisors: Any) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
        reader: A `gguf.GGUFReader`.
        known: Its tensors, by Hugging Face name.
        divisors: The tensor of the frequencies' divisors, or None.

    Raises:
        ValueError: If the family, or what a key asks for, is not one we compute.
    """
    family = gguf_field(reader, "general.architecture")
    if family not in _FAMILIES:
        raise ValueError(
            f"The architecture must be one of {_FAMILIES}. Got {family!r}."
        )

    def get(key: str, default: Any = None) -> Any:
        return gguf_field(reader, f"{family}.{key}", default)

    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    supported = {  # values of a key; others would change the model silently
        "rope.scaling.type": ("none", "linear"),  # linear by the factor below
        "rope.scaling.factor": (1,),
        "rope.scale_linear": (1,),  # its old name
        "rope.dimension_count": (head_dim,),
        "attention.sliding_window": (0,),
        "attention.causal": (True,),
    }
    wrong = [
        f"`{family}.{key}` must be {' or '.join(map(repr, allowed))}. Got {value!r}."
        for key, allowed in supported.items()
        if (value := get(key, allowed[0])) not in allowed
    ]
    if wrong:
        raise ValueError(" ".join(wrong))
    first = "model.layers.0."
    return DecoderConfig(
        vocab_size=int(known["model.embed_tokens.weight"].shape[-1]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        rope_divisors=() if divisors is None else tuple(divisors.data.tolist()),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tie_embeddings="lm_head.weight" not in known,
        qkv_bias=first + "self_attn.q_proj.bias" in known,
        o_bias=first + "self_attn.o_proj.bias" in known,
        mlp_bias=first + "mlp.gate_proj.bias" in known,
    )


def tensor_names(num_layers: int) -> Iterator[tuple[str, str, str, int | None]]:
    """Yields Hugging Face name, GGUF name, path in the parameters, layer.

    Example:
        >>> list(tensor_names(num_layers=1))[3]  # doctest: +NORMALIZE_WHITESPACE
        ('model.layers.0.input_layernorm.weight', 'blk.0.attn_norm.weight',
         'layers/input_layernorm/scale', 0)
    """
    for ours, theirs, path in _TOP:
        yield ours, theirs, path, None
    for layer in range(num_layers):
        hf, gg = f"model.layers.{layer}.", f"blk.{layer}."
        for ours, theirs in _NORMS:
            yield (
                f"{hf}{ours}.weight",
                f"{gg}{theirs}.weight",
                f"layers/{ours}/scale",
                layer,
            )
        for ours, theirs in _LINEAR:
            path = "layers/" + ours.replace(".", "/")
            yield f"{hf}{ours}.weight", f"{gg}{theirs}.weight", f"{path}/kernel", layer
            yield f"{hf}{ours}.bias", f"{gg}{theirs}.bias", f"{path}/bias", layer


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters, by path; those of one layer.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32,
        ...     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        >>> parameter_shapes(config_from_hf(raw))["layers/mlp/up_proj/kernel"]
        (32, 48)
    """
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    wide, narrow = c.intermediate_size, c.hidden_size
    linear = {
        "self_attn/q_proj": (narrow, q, c.qkv_bias),
        "self_attn/k_proj": (narrow, kv, c.qkv_bias),
        "self_attn/v_proj": (narrow, kv, c.qkv_bias),
        "self_attn/o_proj": (q, narrow, c.o_bias),
        "mlp/gate_proj": (narrow, wide, c.mlp_bias),
        "mlp/up_proj": (narrow, wide, c.mlp_bias),
        "mlp/down_proj": (wide, narrow, c.mlp_bias),
    }
    shapes = {"embed_tokens/embedding": (c.vocab_size, narrow), "norm/scale": (narrow,)}
    if not c.tie_embeddings:
        shapes["lm_head/kernel"] = (narrow, c.vocab_size)
    shapes |= {f"layers/{name}/scale": (narrow,) for name, _ in _NORMS}
    for name, (rows, columns, bias) in linear.items():
        shapes[f"layers/{name}/kernel"] = (rows, columns)
        if bias:
            shapes[f"layers/{name}/bias"] = (columns,)
    return shapes
