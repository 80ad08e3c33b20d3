"""Writes a Hugging Face model's folder: shards, index, config, tokenizer files."""

import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._jax.progress import progress_bar
from .files import Path, member, new_folder, read_json, write_json
from .safetensors import INDEX, write_safetensors
from .tensors import DeferredTensor

SHARD_BYTES = 5 << 30
TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes it
# Files of tokenizers, templates and the settings of generation.
COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def read_config_json(folder: Path) -> dict[str, Any]:
    """Returns the content of a model folder's `config.json`.

    Args:
        folder: The folder.

    Raises:
        CheckpointError: If there is none, if it is a link out of the folder, or if it
            is not one strict JSON object (a key twice, NaN).

    Example:
        >>> import pathlib, tempfile, qlora_jax as ql
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.json").write_text('{"model_type": "llama"}')
        >>> ql.io.read_config_json(folder)
        {'model_type': 'llama'}
    """
    return read_json(member(folder, "config.json"))


def write_folder(
    path: Path,
    tensors: Mapping[str, Any],
    config: Path | Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a model's folder atomically; it must be new or empty.

    Each tensor is computed once, then dropped. `config` is the JSON, or a folder with
    one and tokenizer files. `changes` update it; a value of None removes its key.
    """
    own = config if isinstance(config, Mapping) else read_config_json(config)
    both = {**own, **changes}
    if "quantization_config" in changes:  # MLX has this key, too
        both.pop("quantization", None)
    settings = {k: x for k, x in both.items() if x is not None or k not in changes}
    settings |= older_config_keys(settings)
    shards = _shards(tensors, max_shard_bytes)
    size = sum(_nbytes(x) for x in tensors.values())
    scaled: Any = dict(total=size, unit_scale=True)
    with (
        new_folder(path) as folder,
        progress_bar("writing", "B", progress, **scaled) as bar,
    ):
        for file, names in shards.items():
            counted = {name: _counted(tensors[name], bar.update) for name in names}
            write_safetensors(folder / file, counted, metadata={"format": "pt"})
        if len(shards) > 1:
            where = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": where}
            write_json(folder / INDEX, index)
        write_json(folder / "config.json", settings)
        if not isinstance(config, Mapping):
            _copy_files(pathlib.Path(config), folder)


def older_config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys by which older `config.json` files describe rotary positions.

    transformers 5 writes `rope_parameters`, for all layers or by the kind of layer, and
    reads both forms. mlx-lm reads the older keys for most families. Folders that this
    library writes have both.

    Args:
        config: What a `config.json` holds.

    Returns:
        The older keys that `config` lacks, with their values.

    Example:
        >>> import qlora_jax as ql
        >>> rope = {"rope_type": "default", "rope_theta": 5e5}
        >>> ql.io.older_config_keys({"rope_parameters": rope})
        {'rope_theta': 500000.0}
    """
    sections = config.get("rope_parameters") or {}
    rope = sections.get("full_attention", sections)
    local = sections.get("sliding_attention") or {}
    keys = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    keys["rope_local_base_freq"] = local.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    if config.get("model_type") == "qwen3_moe":
        keys["num_experts"] = config.get("num_local_experts")
    return {k: x for k, x in keys.items() if x is not None and config.get(k) is None}


def _copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    for name in COPIED:
        if (source / name).exists() or (source / name).is_symlink():
            shutil.copyfile(member(source, name), folder / name)
    for file in (source / TEMPLATES).glob("*.jinja"):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(member(file.parent, file.name), folder / TEMPLATES / file.name)


def _nbytes(x: Any) -> int:
    return int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize


def _shards(tensors: Mapping[str, Any], limit: int) -> dict[str, list[str]]:
    """Returns which tensors each file holds."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, x in tensors.items():
        if groups[-1] and size + _nbytes(x) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(x)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    name = lambda i: f"model-{i:05d}-of-{len(groups):05d}.safetensors"
    return {name(i): names for i, names in enumerate(groups, 1)}


def _counted(tensor: Any, done: Callable[[int], Any]) -> DeferredTensor:
    """Returns a tensor that reports its bytes once it is made."""

    def make() -> np.ndarray:
        x = np.asarray(tensor)
        done(x.nbytes)
        return x

    return DeferredTensor(tensor.dtype, tuple(tensor.shape), make)
