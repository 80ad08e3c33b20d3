"""What a GGUF file says of a decoder beside its tensors."""

import pathlib
from typing import Any

import qlora_jax as ql

from .config import DecoderConfig
from .families.gemma3 import text_config
from .gguf_config import architecture_of, check_config, values_of
from .gguf_in import read_metadata


def gguf_architecture(config: DecoderConfig, context: int) -> str:
    """Returns the architecture that llama.cpp computes a decoder with.

    Args:
        config: The decoder's config.
        context: How many positions it was trained with.

    Raises:
        ValueError: If llama.cpp computes another decoder; all differences are listed.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> gguf_architecture(config, context=128)
        'llama'
    """
    kind = architecture_of(config)
    check_config(config, kind, context)
    return kind


def add_metadata(
    writer: Any, config: DecoderConfig, source: pathlib.Path, fmt: str
) -> None:
    """Adds what llama.cpp computes a decoder by to a `gguf.GGUFWriter`."""
    import gguf

    writer.add_name(source.stem if source.suffix == ".gguf" else source.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{fmt}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    adders = {int: "uint32", float: "float32", str: "string"}
    for key, value in values_of(config, writer.arch, context_of(source)).items():
        getattr(writer, f"add_{adders[type(value)]}")(f"{writer.arch}.{key}", value)


def context_of(source: pathlib.Path) -> int:
    """Returns how many tokens a model was trained with.

    Raises:
        ValueError: If `source` does not say it.
    """
    if source.suffix == ".gguf":
        found = read_metadata(source, "context_length")
    else:
        raw = text_config(ql.io.read_config_json(source))
        found = raw.get("max_position_embeddings")
    if not found:
        raise ValueError(f"{source} must say how many positions the model has.")
    return int(found)
