"""The decoder's checkpoints on disk.

A checkpoint is a folder (`config.json` and `*.safetensors`) or one `.gguf` file. Both
are read one tensor at a time, as NumPy arrays, into stacks over the layers; no torch.
Inside this module tensors have their Hugging Face names.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .decoder import DecoderConfig
from .families import (
    config_from_gguf,
    config_from_hf,
    gguf_field,
    parameter_shapes,
    tensor_names,
)

ReadTensor = Callable[[str], np.ndarray]


def load(
    path: str | pathlib.Path, dtype: Any = jnp.float32
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Loads a checkpoint.

    Args:
        path: A folder with `config.json` and `*.safetensors`, or a `.gguf` file.
        dtype: Dtype to hold every parameter in.

    Returns:
        The config and the parameters of `Decoder`.

    Raises:
        ValueError: If tensors are missing, left over, or have another shape.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _load_gguf(path, dtype)
    return _load_folder(path, dtype)


def _load_folder(folder: pathlib.Path, dtype):
    from safetensors import safe_open

    config = config_from_hf(json.loads((folder / "config.json").read_text("utf-8")))
    files = sorted(folder.glob("*.safetensors"))
    opened = [safe_open(str(file), framework="numpy") for file in files]
    where = {name: file for file in opened for name in file.keys()}
    return config, _stack(
        config, where, lambda name: where[name].get_tensor(name), dtype
    )


def _load_gguf(path: pathlib.Path, dtype):
    import gguf

    reader = gguf.GGUFReader(str(path))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = {theirs: ours for ours, theirs, _, _ in tensor_names(len(tensors))}
    divisors = tensors.pop("rope_freqs.weight", None)
    known = {names.get(name, name): tensor for name, tensor in tensors.items()}
    config = config_from_gguf(reader, known, divisors)

    def read(name):
        tensor = known[name]
        x = gguf.dequantize(tensor.data, tensor.tensor_type)
        if gguf_field(reader, "general.architecture") == "llama":
            if ".q_proj." in name:
                return unpermute(x, config.num_heads)
            if ".k_proj." in name:
                return unpermute(x, config.num_kv_heads)
        return x

    return config, _stack(config, known, read, dtype)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k: i and i + Dh/2 side by side.

    Example:
        >>> unpermute(np.array([0, 2, 1, 3]), heads=1)
        array([0, 1, 2, 3])
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _stack(config: DecoderConfig, found: Mapping, read: ReadTensor, dtype):
    """Reads each tensor once, into its layer's place in a stack."""
    shapes = parameter_shapes(config)
    wanted = [name for name in tensor_names(config.num_layers) if name[2] in shapes]
    missing = [ours for ours, _, _, _ in wanted if ours not in found]
    ignored = r".*\.inv_freq|lm_head\..*" if config.tie_embeddings else r".*\.inv_freq"
    extra = set(found) - {ours for ours, _, _, _ in wanted}
    extra = sorted(name for name in extra if not re.fullmatch(ignored, name))
    if missing or extra:
        raise ValueError(
            "The checkpoint must hold exactly the model's tensors. "
            f"Missing: {missing}. Left over: {extra}."
        )
    stacks: dict[str, np.ndarray] = {}
    for ours, _, path, layer in wanted:
        x, shape = read(ours), shapes[path]
        x = x.T if path.endswith("kernel") else x
        if x.shape != shape:
            raise ValueError(f"{ours} must have shape {shape}. Got {x.shape}.")
        if path not in stacks:
            lead = () if layer is None else (config.num_layers,)
            stacks[path] = np.empty(lead + shape, dtype)
        stacks[path][... if layer is None else layer] = x
    params: dict[str, Any] = {}
    for path in list(stacks):
        *parents, leaf = path.split("/")
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(stacks.pop(path))
    return params
