"""All file formats, and the functions that read and write packed weights with them."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from ...quant.kernel import is_packed
from ...quant.qtensor import QTensor
from ...trees.paths import Tree, raise_if_any
from ..files import CheckpointError, Path, member, read_json, require
from ..model_folder import SHARD_BYTES, read_config_json, write_folder
from ..named_leaves import (
    NamedLeaf,
    exported_leaves,
    float_tensors_of,
    join_experts,
    matrix_of,
)
from ..names import Names
from ..stored_weight import packing_of
from .awq import AWQ
from .bitsandbytes import BITSANDBYTES, BITSANDBYTES_INT8
from .compressed_tensors import COMPRESSED_TENSORS
from .file_format import Config, FileFormat, Parts, Settings, Writer
from .gpt_oss import GPT_OSS

FILE_FORMATS: list[FileFormat] = [BITSANDBYTES, BITSANDBYTES_INT8, COMPRESSED_TENSORS]
FILE_FORMATS += [AWQ, GPT_OSS]
# Sections of the settings whose numbers of bits do not describe weights.
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme", "meta")


def packed_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors, with the parts of each 4-bit weight joined.

    Each 4-bit weight becomes one tensor, which has a `packing`. The formats are those
    of bitsandbytes, compressed-tensors, AWQ (with zero points of 8, as `save_packed`
    writes it) and gpt-oss (MXFP4; the experts become tensors `NAME.0`, `NAME.1` ...).

    Args:
        tensors: From `open_safetensors`. A folder's quantization config is checked too.

    Raises:
        CheckpointError: If a part of a weight is missing or does not fit (all such
            weights are listed), or if the config describes an unsupported format.

    Example:
        >>> import numpy as np, qlora_jax as ql
        >>> blocks = np.zeros((1, 2, 1, 16), np.uint8)
        >>> scales = np.full((1, 2, 1), 127, np.uint8)
        >>> tensors = {"up_blocks": blocks, "up_scales": scales}
        >>> weight = ql.io.packed_tensors(tensors)["up.0"]
        >>> weight.shape, weight.packing.fmt
        ((2, 32), 'mxfp4')
    """
    folder = getattr(tensors, "folder", None)
    settings = {} if folder is None else read_quantization(folder)
    result, problems = dict(tensors), []
    for file_format in FILE_FORMATS:
        matches = [
            re.fullmatch(file_format.marker, name, re.DOTALL)
            for name, x in result.items()
            if file_format.marker_dtype in ("", str(x.dtype)) and packing_of(x) is None
        ]
        for match in filter(None, matches):
            prefix = match[1]
            # A hostile file may have two markers for one weight, such as two tensors
            # `quant_state...`. Parts that the first one used are then missing here.
            ends = [
                end
                for end in (match[0].removeprefix(prefix), *file_format.parts)
                if prefix + end in result and packing_of(result[prefix + end]) is None
            ]
            parts = Parts((end.lstrip("._"), result[prefix + end]) for end in ends)
            try:
                weights = file_format.read(parts, settings)
            except ValueError as error:
                problems.append(f"{prefix.removesuffix('.')}: {error}")
                continue
            for end in ends:
                del result[prefix + end]
            if duplicates := [x for end in weights if (x := prefix + end) in result]:
                problems.append(
                    f"{prefix.removesuffix('.')}: it is packed, so the file must not "
                    f"also have {', '.join(duplicates[:5])}."
                )
            for end, weight in weights.items():
                name = prefix + end
                result[name] = dataclasses.replace(weight, name=name)
    raise_if_any("these 4-bit weights cannot be read", problems, CheckpointError)
    return result


def read_quantization(folder: Path) -> dict[str, Any]:
    """Returns the settings of a model folder's packed weights.

    They are the `quantization_config` in its `config.json`. `quant_method` and `fmt`,
    the format of the weights here, are added. A float model has no settings: {}.

    Args:
        folder: The model's folder.

    Raises:
        CheckpointError: If weights are packed in a way that is not supported.

    Example:
        >>> import pathlib, tempfile, qlora_jax as ql
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> text = '{"quantization_config": {"quant_method": "awq", "bits": 4}}'
        >>> _ = (folder / "config.json").write_text(text)
        >>> ql.io.read_quantization(folder)["fmt"]
        'int4_f16'
    """
    folder = pathlib.Path(folder)
    if not (folder / "config.json").exists() or not (stored := _find_settings(folder)):
        return {}
    require(isinstance(stored, dict), "`quantization_config` must be a JSON object.")
    # MLX does not write the method, nor did older versions of transformers. Folders of
    # MLX and ModelOpt are recognized so that the error can name the method.
    default_method = "mlx" if "group_size" in stored else "bitsandbytes"
    method = stored.get("quant_method", default_method)
    formats = {name: x for x in FILE_FORMATS for name in x.methods}
    is_supported = isinstance(method, str) and method in formats
    message = f"`quant_method` must be one of {', '.join(formats)}. Got "
    message += f"{method!r:.80}. Start from the float model that was packed."
    require(is_supported, message)
    other_bits = [f"`{key}` is {bits!r:.80}" for key, bits in _other_bits(stored)]
    message = f"weights of {method} must have 4 bits. Got {', '.join(other_bits[:5])}."
    require(not other_bits, message)
    settings = {**stored, "quant_method": method, "fmt": formats[method].fmt}
    settings = formats[method].read_settings(settings)
    for key, supported in formats[method].methods[method].items():
        value = settings.get(key, supported[0])
        choices = " or ".join(supported)
        message = f"`{key}` of {method} must be {choices}. Got {value!r:.80}."
        require(value in supported, message)
    return settings


def _find_settings(folder: pathlib.Path) -> Any:
    """Returns the JSON value of the settings, or None if the folder has none."""
    raw = read_config_json(folder)
    # The config of a multimodal model contains the config of its language model.
    inner = raw.get("text_config")
    for config in (raw, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "quantization"):
            if config.get(key):
                return config[key]
    if not (folder / "hf_quant_config.json").exists():
        return None
    stored = read_json(member(folder, "hf_quant_config.json")).get("quantization")
    require(isinstance(stored, dict), "`quantization` must be a JSON object.")
    return {**stored, "quant_method": "modelopt"} if stored else None


def _other_bits(settings: Settings) -> Iterator[tuple[str, object]]:
    """Yields the keys and values of settings that give weights other than 4 bits."""
    for key, value in settings.items():
        if isinstance(value, dict) and key not in _NOT_WEIGHTS:
            yield from ((f"{key}.{inner}", bits) for inner, bits in _other_bits(value))
        elif key in ("bits", "num_bits") and value not in (4, None):
            yield key, value


def save_bitsandbytes(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Config,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Packed kernels keep their codes and scales to the byte; others stay in float.

    Args:
        path: The folder to write, new or empty.
        base: The base tree, with packed kernels.
        names: The names of the leaves' tensors in the checkpoint.
        config: A folder with the float model's `config.json` and tokenizer files, which
            are copied; or the content of that `config.json`.
        max_shard_bytes: The largest size of a file, unless one tensor is larger.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If bitsandbytes has no format for a packed kernel (all are listed),
            if no kernel is packed or their formats differ, or if the folder is not
            empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 2)), "nf4")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_bitsandbytes(path, base, names, {"model_type": "mine"})
        >>> sorted(ql.io.open_safetensors(path))[:2]
        ['up.weight', 'up.weight.absmax']
    """
    layout: Any = "bitsandbytes"  # not in the type: only this function passes it
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    save_packed(path, base, names, config, layout, **options)


def save_packed(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Config,
    layout: Literal["awq", "compressed-tensors"],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that vLLM and transformers load.

    Packed kernels keep their codes and the exact values of their scales; others stay
    in float.

    Args:
        path: The folder to write, as in `save_bitsandbytes`.
        base: The base tree. Packed kernels must be `int4_f16` or `q4_0`; for
            compressed-tensors, `mxfp4` and `nvfp4` are also possible.
        names: The names of the leaves' tensors in the checkpoint.
        config: As in `save_bitsandbytes`.
        layout: The layout of packed kernels in the files.
        max_shard_bytes: The largest size of a file, unless one tensor is larger.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If `layout` is unknown or cannot hold a packed kernel (all are
            listed), if no kernel is packed or their settings differ, or if the folder
            is not empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((128, 8)), "int4_f16")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_packed(path, base, names, {"model_type": "mine"}, "awq")
        >>> list(ql.io.open_safetensors(path))
        ['up.qweight', 'up.qzeros', 'up.scales']
    """
    writers = {x.write.name.lower(): x.write for x in FILE_FORMATS if x.write}
    if layout not in writers:
        raise ValueError(f"`layout` must be one of {sorted(writers)}. Got {layout!r}.")
    writer = writers[layout]
    leaves = exported_leaves(base, names)
    # 1. Check all kernels before anything is written.
    packed = [(leaf, x) for leaf, x in leaves if is_packed(x)]
    problems = {leaf.path: _problem(leaf, q, writer) for leaf, q in packed}
    raise_if_any(f"{writer.name} cannot store these kernels", problems)
    settings = {tuple(getattr(q, name) for name in writer.shared) for _, q in packed}
    if len(settings) != 1:
        message = "`base` must have packed kernels, all with the same settings for "
        raise ValueError(f"{message}{writer.name}. Got {sorted(settings)}.")
    # 2. List the tensors of all leaves. Their values are computed when written.
    tensors: dict[str, Any] = {}
    kernels: dict[str, QTensor] = {}
    float_modules = []
    for leaf, x in leaves:
        if not is_packed(x):
            tensors |= float_tensors_of(leaf, x)
            modules = [name.removesuffix(".weight") for name in leaf.tensor_names.flat]
            float_modules += modules if leaf.geometry is not None else []
            continue
        for index, name in np.ndenumerate(leaf.tensor_names):
            kernels[name] = matrix_of(x, index)
            tensors |= writer.tensors(name, kernels[name])
    tensors = join_experts(tensors, names)  # for experts in float
    # Without a weight of its own, the head multiplies with the embedding, which is in
    # float. Readers would otherwise expect a packed weight.
    if "lm_head.weight" not in {*tensors, *kernels}:
        float_modules.append("lm_head")
    # 3. Describe the kernels in the config.
    old_config = config if isinstance(config, Mapping) else read_config_json(config)
    changes = writer.config(kernels, float_modules, old_config)
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_folder(path, tensors, config, changes, **options)


def _problem(leaf: NamedLeaf, q: QTensor, writer: Writer) -> str | None:
    if q.fmt not in writer.formats:
        return f"its format must be {' or '.join(writer.formats)}. Got {q.fmt}"
    for name in leaf.tensor_names.flat:
        if not name.endswith(".weight"):
            return f"its name must end in .weight. Got {name}"
    return writer.problem(q) if writer.problem else None
