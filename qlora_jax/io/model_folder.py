"""Writes a Hugging Face model's folder: shards, index, config, tokenizer files."""

import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._jax.progress import progress_bar
from .files import Path, check_links, member, new_folder, read_json, require, write_json
from .safetensors import INDEX, write_safetensors
from .tensors import DeferredTensor, TensorLike

SHARD_BYTES = 5 << 30  # the default of functions that write a model's folder
_TEMPLATES = "additional_chat_templates"  # a folder that transformers writes
# Files of tokenizers, processors, templates and generation settings, copied if they
# exist.
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)


def read_config_json(folder: Path) -> dict[str, Any]:
    """Returns the content of a model folder's `config.json`."""
    return read_json(member(folder, "config.json"))


def write_folder(
    path: Path,
    tensors: Mapping[str, TensorLike],
    config: Path | Mapping[str, Any],
    changes: Mapping[str, object],
    *,
    max_shard_bytes: int,
    progress: bool,
) -> None:
    """Writes a model's folder atomically; it must be new or empty.

    Each tensor is computed once and then dropped. `config` is the JSON, or a folder
    with a `config.json` and tokenizer files. `changes` update the config; a value of
    None removes its key.
    """
    old_config = config if isinstance(config, Mapping) else read_config_json(config)
    merged = {**old_config, **changes}
    new_config = {k: x for k, x in merged.items() if x is not None or k not in changes}
    if "quantization_config" in changes:
        new_config.pop("quantization", None)  # MLX's name for the same settings
        # Multimodal models may have these settings in the language model's config.
        if isinstance(text_config := new_config.get("text_config"), Mapping):
            removed_keys = ("quantization_config", "quantization")
            new_config["text_config"] = {
                k: x for k, x in text_config.items() if k not in removed_keys
            }
    # mlx-lm and older versions of transformers read the older keys.
    new_config |= older_config_keys(new_config)
    shards = _shards(tensors, max_shard_bytes)
    size = sum(_nbytes(x) for x in tensors.values())
    bar_settings: dict[str, Any] = {"total": size, "unit_scale": True}
    with (
        new_folder(path) as folder,
        progress_bar("writing", "B", progress, **bar_settings) as bar,
    ):
        for file, names in shards.items():
            # The bar advances as each tensor is computed.
            counted = {name: _counted(tensors[name], bar.update) for name in names}
            # transformers rejects files without the metadata `format`.
            write_safetensors(folder / file, counted, metadata={"format": "pt"})
        if len(shards) > 1:
            # Without an index, readers expect a single `model.safetensors`.
            weight_map = {
                name: file for file, names in shards.items() for name in names
            }
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder / INDEX, index)
        write_json(folder / "config.json", new_config)
        if not isinstance(config, Mapping):
            _copy_files(pathlib.Path(config), folder)


def older_config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that older `config.json` files have for renamed settings.

    They describe rotary embeddings and the number of experts of Qwen3 MoE. For rotary
    embeddings, transformers 5 writes `rope_parameters`, for all layers or by the kind
    of layer, and reads both forms. mlx-lm reads the older keys for most families. This
    library writes both.
    """
    parameters = _section(config, "rope_parameters")
    if "full_attention" in parameters:
        # There is a section for each kind of layer. Only Gemma 3 has older keys for
        # such settings, among them a base frequency for its sliding layers. In other
        # models, transformers would apply the older keys to all kinds of layers.
        is_gemma3 = str(config.get("model_type")).startswith("gemma3")
        parameters = parameters if is_gemma3 else {}
        rope = _section(parameters, "full_attention")
    else:
        rope = parameters
    sliding = _section(parameters, "sliding_attention")
    keys = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    keys["rope_local_base_freq"] = sliding.get("rope_theta")
    # As in transformers, the key may be `type` in either form.
    rope_type = rope.get("rope_type", rope.get("type")) or "default"
    if rope_type != "default":
        # Readers of the older form expect the key `type`, some also `rope_type`.
        keys["rope_scaling"] = {**rope, "type": rope_type}
    # transformers 5 has also renamed the number of experts.
    if config.get("model_type") == "qwen3_moe":
        keys["num_experts"] = config.get("num_local_experts")
    return {k: x for k, x in keys.items() if x is not None and config.get(k) is None}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    message = f"`{key}` must be a JSON object. Got {section!r:.80}."
    require(section is None or isinstance(section, Mapping), message)
    return section or {}


def _copy_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    check_links(source, [_TEMPLATES])
    for name in _COPIED:
        # Missing files are skipped, but `member` rejects a dangling link.
        if (source / name).exists() or (source / name).is_symlink():
            shutil.copyfile(member(source, name), folder / name)
    for file in (source / _TEMPLATES).glob("*.jinja"):
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        target = folder / _TEMPLATES / file.name
        shutil.copyfile(member(file.parent, file.name), target)


def _nbytes(x: TensorLike) -> int:
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _shards(tensors: Mapping[str, TensorLike], max_bytes: int) -> dict[str, list[str]]:
    """Returns the names of the tensors in each file, in the order of `tensors`."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, x in tensors.items():
        # A tensor that is larger than the limit gets a file of its own.
        if groups[-1] and size + _nbytes(x) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _nbytes(x)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, 1)
    }


def _counted(tensor: TensorLike, count: Callable[[int], object]) -> DeferredTensor:
    """Returns a tensor that passes its size to `count` once it is computed."""

    def compute() -> np.ndarray:
        x = np.asarray(tensor)
        count(x.nbytes)
        return x

    return DeferredTensor(tensor.dtype, tuple(tensor.shape), compute)
