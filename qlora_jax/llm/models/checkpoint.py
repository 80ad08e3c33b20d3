"""Reads the decoder's checkpoints, which are Hugging Face folders."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

import qlora_jax as ql

from .config import DecoderConfig
from .decoder import Decoder
from .decoder_names import decoder_names
from .folder import ModelFolder


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
        path: A folder with `config.json` and `*.safetensors`.
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
    folder = ModelFolder(pathlib.Path(path))
    config = folder.config
    params = ql.io.load(
        folder.open_tensors(),
        decoder_names(config),
        abstract_params(config),
        qlora,
        dtype=dtype,
        recode=recode,
        place=place,
        progress=progress,
    )
    return config, params


def read_config(path: str | pathlib.Path) -> DecoderConfig:
    """Returns the config of a checkpoint's decoder.

    Args:
        path: A folder with `config.json`.

    Raises:
        ValueError: If `Decoder` does not support the model.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> read_config(save_tiny(tempfile.mkdtemp())).hidden_size
        64
    """
    return ModelFolder(pathlib.Path(path)).config


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
