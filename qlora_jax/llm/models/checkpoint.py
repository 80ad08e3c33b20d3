"""Reads the decoder's checkpoints: Hugging Face folders and `.gguf` files."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

import qlora_jax as ql

from ..gguf.decoder_in import read_gguf
from .config import DecoderConfig
from .decoder import Decoder
from .decoder_names import decoder_names
from .families import config_from_hf, text_config

# Suffixes of the files in a folder that contain settings, not weights.
_SETTINGS_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_HEAD_ROWS = 4096  # number of rows of the head that are compared at a time


def load(
    path: str | pathlib.Path,
    dtype: DTypeLike = jnp.float32,
    qlora: ql.QLoRAConfig | None = None,
    *,
    recode: bool = False,
    place: Callable[[PyTree], PyTree] | None = None,
    progress: bool = True,
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the config and the parameters of `Decoder` in a checkpoint.

    Args:
        path: A folder with `config.json` and `*.safetensors`, or a `.gguf` file.
        dtype: Dtype of all parameters except weights in bitsandbytes' 4-bit format.
        qlora: Which kernels to pack while reading, and how; None to pack none.
        recode: As in `ql.io.load`: re-pack 4-bit weights whose byte layout has no
            equivalent here.
        place: As in `ql.io.load`: gives the parameters their shardings.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `Decoder` does not support the model, if the tensors do not match
            the config, or if the head is tied but the file has a different one.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> config, params = load(folder, progress=False)
        >>> params["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 64, 128)
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        config, source = read_gguf(path)
        # This keeps all values: blocks without an equivalent are decoded to float.
        recode = True
    else:
        config = read_config(path)
        if has_vision(config):
            source = _open_text_tensors(path, config)
        else:
            source = ql.io.open_safetensors(path)
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


def _check_head(tensors: ql.io.Tensors, config: DecoderConfig) -> None:
    """Raises if a file has a head that differs from the embedding that it is tied to.

    transformers would use the head in the file.
    """
    names = "lm_head.weight", f"{config.module}.embed_tokens.weight"
    if not config.tie_embeddings or not set(names) <= tensors.keys():
        return
    head, embedding = (tensors[name] for name in names)
    # Slices read only a part of large arrays at a time.
    starts = range(0, head.shape[0], _HEAD_ROWS)
    parts = (slice(start, start + _HEAD_ROWS) for start in starts)
    if head.shape != embedding.shape or not all(
        np.array_equal(head[part], embedding[part]) for part in parts
    ):
        raise ValueError(
            "`tie_word_embeddings` in config.json must be false, since the file has "
            f"an {names[0]} that differs from {names[1]}. Got true."
        )


def read_config(path: str | pathlib.Path) -> DecoderConfig:
    """Returns the config of a checkpoint's decoder.

    Args:
        path: A folder with `config.json`, or a `.gguf` file.

    Raises:
        ValueError: If `Decoder` does not support the model.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> read_config(save_tiny(tempfile.mkdtemp())).hidden_size
        64
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return read_gguf(path)[0]
    raw = ql.io.read_config_json(path)
    ql.io.read_quantization(path)  # raises if the packed format is not supported
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
    # Copy the dicts, so that callers cannot change the cached ones.
    return jax.tree.map(lambda x: x, _trace_params(config))


@functools.cache  # tracing takes much longer than reading a config
def _trace_params(config: DecoderConfig) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def has_vision(config: DecoderConfig) -> bool:
    """Whether a decoder is the text half of a model with a vision part."""
    return config.module != "model"


def _open_text_tensors(folder: pathlib.Path, config: DecoderConfig) -> ql.io.Tensors:
    """Opens the tensors of the text half; warns that the vision part is ignored."""
    tensors, names = ql.io.open_safetensors(folder), decoder_names(config)
    ignored = [name for name in tensors if names.is_ignored(name)]
    warnings.warn(
        f"{folder} has a vision part. Its {len(ignored)} tensors are ignored: only "
        "the text half is read.",
        stacklevel=3,
    )
    # The files have names from older versions of transformers, but adapters use the
    # names of its current modules.
    renamed = {}
    for name in tensors:
        new_name = re.sub(r"^language_model\.model\.", f"{config.module}.", name)
        renamed[re.sub(r"^language_model\.", "", new_name)] = tensors[name]
    return dataclasses.replace(tensors, _tensors=renamed)


@contextlib.contextmanager
def folder_of_text(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary folder with the text half's config and tokenizer."""
    config = text_config(ql.io.read_config_json(folder))
    with tempfile.TemporaryDirectory() as temporary:
        text_folder = pathlib.Path(temporary)
        for file in folder.iterdir():
            is_index = file.name.endswith(".index.json")  # lists the weights' files
            if file.suffix in _SETTINGS_SUFFIXES and not is_index:
                shutil.copyfile(file, text_folder / file.name)
        if (templates := folder / "additional_chat_templates").is_dir():
            shutil.copytree(templates, text_folder / templates.name)
        text = json.dumps(config, indent=2) + "\n"
        (text_folder / "config.json").write_text(text, "utf-8")
        yield text_folder
