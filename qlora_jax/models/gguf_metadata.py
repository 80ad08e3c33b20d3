"""What a GGUF file says of a decoder beside its tensors."""

import pathlib
from typing import Any

import qlora_jax as ql

from .config import DecoderConfig
from .gguf_in import read_metadata


def gguf_architecture(config: DecoderConfig) -> str:
    """Returns the architecture that llama.cpp computes a decoder with.

    Raises:
        ValueError: If a part of it has no place in the files that we write; all such
            parts are listed.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> gguf_architecture(config)
        'llama'
    """
    c = config
    kind = "llama"
    if c.qk_norms:
        kind = "qwen3"
    elif c.qkv_bias and not (c.o_bias or c.mlp_bias):
        kind = "qwen2"
    ropes = [rope for rope in c.ropes if rope is not None]
    unsupported = {
        "a sliding window": any(layer.window is not None for layer in c.layers),
        "layers without rotary positions": None in c.ropes,
        "several kinds of rotary positions": len(c.ropes) > 1,
        "scaled or length-dependent rotary positions": any(
            rope.long_divisors or rope.scale != 1 for rope in ropes
        ),
        f"stretched rotary positions in {kind}": kind != "llama"
        and any(rope.divisors for rope in ropes),
        "partial rotary positions": c.rotary_dim != c.head_dim,
        f"biases in {kind}": kind == "qwen3" and (c.qkv_bias or c.o_bias or c.mlp_bias),
        "norms with a unit offset": c.unit_offset_norms,
        "norms after attention and MLP": c.post_norms,
        "an activation other than silu": c.activation != "silu",
        "fused projections": c.fused,
        "scaled embeddings": c.embedding_scale != 1,
        "scaled attention": c.attention_scale != c.head_dim**-0.5,
        "soft-caps": (c.attention_soft_cap, c.logit_soft_cap) != (None, None),
    }
    if found := [name for name, has in unsupported.items() if has]:
        raise ValueError(f"a model in GGUF must not have {', '.join(found)}.")
    return kind


def add_metadata(
    writer: Any, config: DecoderConfig, source: pathlib.Path, fmt: str
) -> None:
    """Adds what llama.cpp computes a decoder by to a `gguf.GGUFWriter`.

    Raises:
        ValueError: If `source` does not say how long the context is.
    """
    import gguf

    c = config
    (rope,) = c.ropes
    assert rope is not None
    writer.add_name(source.stem if source.suffix == ".gguf" else source.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{fmt}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(_context(source))
    writer.add_vocab_size(c.vocab_size)
    writer.add_block_count(c.num_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)


def _context(source: pathlib.Path) -> int:
    """Returns how many tokens the model was trained with."""
    if source.suffix == ".gguf":
        found = read_metadata(source, "context_length")
    else:
        found = ql.io.read_config_json(source).get("max_position_embeddings")
    if not found:
        raise ValueError(f"{source} must say how many positions the model has.")
    return int(found)
