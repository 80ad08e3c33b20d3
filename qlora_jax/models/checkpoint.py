"""Reads the decoder's checkpoints: Hugging Face folders and `.gguf` files."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql

from .config import DecoderConfig
from .decoder import Decoder
from .decoder_names import decoder_names
from .families import config_from_hf
from .gguf.decoder_in import read_gguf
from .text_half import has_vision, text_tensors


def load(
    path: str | pathlib.Path,
    dtype: Any = jnp.float32,
    qlora: ql.QLoRAConfig | None = None,
    *,
    recode: bool = False,
    place: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the config and the parameters of `Decoder` in a checkpoint.

    Args:
        path: A folder with `config.json` and `*.safetensors`, or a `.gguf` file.
        dtype: Dtype of every parameter but weights in bitsandbytes' 4-bit format.
        qlora: The kernels to pack as they are read, and settings; None for none.
        recode: As in `ql.io.load`: read 4-bit weights whose bytes cannot be moved.
        place: As in `ql.io.load`: gives the parameters their shardings.
        progress: Whether to show a bar.

    Raises:
        ValueError: If `Decoder` lacks a part, tensors do not fit, or the file of a tied
            model holds a head of its own.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> config, params = load(folder, progress=False)
        >>> params["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 64, 128)
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        config, source = read_gguf(path)
        recode = True  # what is not moved is read in float, which is exact
    else:
        config = read_config(path)
        has_more = has_vision(config)
        source = (
            text_tensors(path, config) if has_more else ql.io.open_safetensors(path)
        )
        _check_head(source, config)
    params = ql.io.load(
        source,
        decoder_names(config),
        abstract_params(config),
        qlora,
        dtype=dtype,
        recode=recode,
        place=place,
        progress=progress,
    )
    return config, params


def _check_head(tensors: "ql.io.Tensors", config: DecoderConfig) -> None:
    """Refuses a stored head other than the embedding; transformers would use it."""
    names = "lm_head.weight", f"{config.module}.embed_tokens.weight"
    if not config.tie_embeddings or not set(names) <= tensors.keys():
        return
    head, embedding = (tensors[name] for name in names)
    rows = range(0, head.shape[0], 4096)  # a part of large arrays at a time
    if head.shape != embedding.shape or not all(
        np.array_equal(head[i : i + 4096], embedding[i : i + 4096]) for i in rows
    ):
        raise ValueError(
            "`tie_word_embeddings` in config.json must be false, as the file holds "
            f"another {names[0]} than {names[1]}. Got true."
        )


def read_config(path: str | pathlib.Path) -> DecoderConfig:
    """Returns the config of a checkpoint's decoder.

    Args:
        path: A folder with `config.json`, or a `.gguf` file.

    Raises:
        ValueError: If it asks for parts that `Decoder` lacks.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> read_config(save_tiny(tempfile.mkdtemp())).hidden_size
        64
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return read_gguf(path)[0]
    raw = ql.io.read_config_json(path)
    ql.io.read_quantization(path)  # refuses what is not read
    return config_from_hf(raw)


def abstract_params(config: DecoderConfig) -> dict[str, Any]:
    """Returns the `jax.ShapeDtypeStruct`s of a decoder's parameters; computes nothing.

    Args:
        config: The decoder's config.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> abstract_params(config)["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 32, 48)
    """
    return jax.tree.map(lambda x: x, _traced_params(config))  # a copy of the dicts


@functools.cache  # a trace takes as long as reading a small model's config
def _traced_params(config: DecoderConfig) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
