"""Reads 4-bit weights of other libraries from a checkpoint."""

import dataclasses
import math
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ...quant.formats import Packing
from ...trees.paths import refuse_listed
from ..files import CheckpointError, Path, member, read_json, require
from ..model_folder import read_config_json
from ..named_leaves import NamedLeaf
from .bitsandbytes import BitsAndBytesWeight, bitsandbytes_weights
from .layouts import LAYOUTS, PartsLayout, Settings
from .weight import PackedWeight, SliceableTensor, View, packing_of

# The settings of each `quant_method` that change how weights are stored, with their
# supported values. The first value is the default.
_SUPPORTED_SETTINGS: dict[str, dict[str, tuple]] = {
    "bitsandbytes": {},
    "compressed-tensors": {},
    "awq": {"version": ("gemm",)},
    "gptq": {"checkpoint_format": ("gptq", "gptq_v2")},
    "modelopt": {"quant_algo": ("NVFP4", "W4A16_NVFP4"), "group_size": (16,)},
    "mxfp4": {},
    "mlx": {"mode": ("affine", "mxfp4", "nvfp4")},
}
# Sections of the settings whose numbers of bits do not describe weights.
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme", "meta")
# Our formats, by the names in the settings. All other names mean int4_f16.
_FORMATS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
_FORMATS |= {"modelopt": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "mxfp4"}
# The packing that the config asks for, by the names of its targets; None for float.
Targets = Mapping[str, Packing | None]
Weight = PackedWeight | BitsAndBytesWeight
# Weights whose blocks would be smaller than this are decoded instead of re-blocked.
SMALLEST_COMMON_BLOCK = 16


def packed_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors, with the parts of each 4-bit weight joined.

    Each 4-bit weight becomes one tensor, which has a `packing`. The formats are those
    of bitsandbytes, compressed-tensors, AWQ, GPTQ, ModelOpt (NVFP4), MLX, GGUF (Q4_0
    and MXFP4) and gpt-oss (MXFP4; the experts become tensors `NAME.0`, `NAME.1` ...).

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
        >>> found = ql.io.packed_tensors(tensors)
        >>> found["up.0"].shape, found["up.0"].packing.fmt
        ((2, 32), 'mxfp4')
    """
    folder = getattr(tensors, "folder", None)
    settings = {} if folder is None else read_quantization(folder)
    result = bitsandbytes_weights(tensors)
    int8_names = [name for name in result if name.endswith(".SCB")]
    reason = "8-bit weights of bitsandbytes are not supported"
    problems = [f"{name}: {reason}" for name in int8_names]
    ignored: list[str] = []
    for layout in LAYOUTS:
        for name in [n for n, x in result.items() if _is_marker(layout, n, x)]:
            try:
                ignored += _replace_parts(result, layout, name, settings)
            except ValueError as error:
                stem = name.rpartition(layout.separator)[0]
                problems.append(f"{stem}: {error}")
    if ignored:
        warnings.warn(
            "activations and key-value caches stay in float, so their scales are "
            f"ignored: {ignored[0]} and {len(ignored) - 1} others.",
            stacklevel=2,
        )
    refuse_listed("these 4-bit weights cannot be read", problems, CheckpointError)
    return result


def _is_marker(layout: PartsLayout, name: str, tensor: SliceableTensor) -> bool:
    has_name = name.rpartition(layout.separator)[-1] == layout.marker
    has_dtype = not layout.dtype or str(tensor.dtype) == layout.dtype
    return has_name and has_dtype and packing_of(tensor) is None


def _replace_parts(
    tensors: dict[str, Any], layout: PartsLayout, name: str, settings: Settings
) -> list[str]:
    """Replaces the parts of a weight with the weight; returns the ignored names."""
    stem = name.removesuffix(layout.marker)
    names = (layout.marker, *layout.optional)
    parts = {part: tensors[stem + part] for part in names if stem + part in tensors}
    weights = layout.read(parts, settings)
    nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in parts.values())
    for part in parts:
        del tensors[stem + part]
    for suffix, weight in weights.items():
        name = stem.removesuffix("_") + suffix
        size = nbytes // len(weights)
        tensors[name] = dataclasses.replace(weight, name=name, nbytes=size)
    ignored = [stem + part for part in layout.ignored if stem + part in tensors]
    for name in ignored:
        del tensors[name]
    return ignored


def read_quantization(folder: Path) -> dict[str, Any]:
    """Returns the settings of a model folder's packed weights.

    They are the `quantization_config` in its `config.json` (`quantization` for MLX, or
    `hf_quant_config.json` for ModelOpt). `quant_method` and `fmt`, the format of the
    weights here, are added. A float model has no settings: {}.

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
    stored = (folder / "config.json").exists() and _find_settings(folder)
    if not stored:
        return {}
    require(isinstance(stored, dict), "`quantization_config` must be a JSON object.")
    default_method = "mlx" if "group_size" in stored else "bitsandbytes"
    method = stored.get("quant_method", default_method)
    is_supported = isinstance(method, str) and method in _SUPPORTED_SETTINGS
    methods = ", ".join(_SUPPORTED_SETTINGS)
    message = f"`quant_method` must be one of {methods}. Got {method!r:.80}."
    require(is_supported, message)
    settings = _use_older_names({**stored, "quant_method": method})
    _check_settings(settings, method)
    if method == "bitsandbytes":
        return settings | {"fmt": settings.get("bnb_4bit_quant_type", "fp4")}
    key = {"compressed-tensors": "format", "mlx": "mode"}.get(method, "quant_method")
    return settings | {"fmt": _FORMATS.get(str(settings.get(key)), "int4_f16")}


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


def _use_older_names(settings: dict[str, Any]) -> dict[str, Any]:
    # Newer files call both of these settings `format`.
    older_names = {"awq": "version", "gptq": "checkpoint_format"}
    key = older_names.get(settings["quant_method"])
    value = settings.get(key or "", settings.get("format"))
    if settings.get("backend") == "llm-awq":  # transformers' name for a version of AWQ
        value = "llm-awq"
    return settings | ({key: str(value).lower()} if key and value else {})


def _check_settings(settings: dict[str, Any], method: str) -> None:
    for key, supported in _SUPPORTED_SETTINGS[method].items():
        value = settings.get(key, supported[0])
        choices = " or ".join(map(str, supported))
        message = f"`{key}` of {method} must be {choices}. Got {value!r:.80}."
        require(value in supported, message)
    message = "`load_in_8bit` must be false: 8-bit weights are not supported. Got true."
    require(method != "bitsandbytes" or not settings.get("load_in_8bit"), message)
    other_bits = [f"`{key}` is {bits!r:.80}" for key, bits in _other_bits(settings)]
    message = f"weights of {method} must have 4 bits. Got {', '.join(other_bits[:5])}."
    require(not other_bits, message)
    groups = settings.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, dict):
        return
    for name, group in groups.items():
        section = group if isinstance(group, dict) else {}
        kinds = ("input_activations", "output_activations")
        has_activations = any(section.get(kind) for kind in kinds)
        message = f"{name} must quantize only weights, not activations. Got {group}."
        require(not has_activations, message)


def _other_bits(settings: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yields the keys and values of settings that give weights other than 4 bits."""
    for key, value in settings.items():
        if isinstance(value, dict) and key not in _NOT_WEIGHTS:
            yield from ((f"{key}.{inner}", bits) for inner, bits in _other_bits(value))
        elif key in ("bits", "num_bits") and value not in (4, None):
            yield key, value


class ReblockedWeight:
    """A weight with the same values, in smaller blocks that do not cross rows."""

    scale_scales = scale_offset = problem = None
    keeps_dtype = True

    def __init__(self, weight: BitsAndBytesWeight):
        self.weight, self.shape, self.dtype = weight, weight.shape, weight.dtype

    @property
    def packing(self) -> Packing:
        """The format of the weight, with smaller blocks and float32 scales."""
        return Packing(self.weight.packing.fmt, self.weight.common_block, False)

    def rows(self) -> tuple[SliceableTensor, SliceableTensor]:
        """Returns codes `[N, K / 2]` and repeated scales `[N, K / B]`."""
        weight, (n, k) = self.weight, self.shape
        old_size, new_size = weight.packing.block_size, self.packing.block_size
        scales = weight.float_scales(slice(0, -(-n * k // old_size)))
        # The old block that contains each new block.
        old_blocks = np.arange(n * k // new_size) * new_size // old_size
        return weight.codes.reshape(n, k // 2), scales[old_blocks].reshape(n, -1)


def decoded_weight(weight: Weight, dtype: DTypeLike | None = None) -> View:
    """Returns a 4-bit weight as floats, which are decoded one slice at a time."""
    keeps_dtype = dtype is None or weight.keeps_dtype
    read_dtype = weight.dtype if keeps_dtype else np.dtype(dtype)

    def read(rows: slice, columns: slice) -> np.ndarray:
        start, stop, _ = rows.indices(weight.shape[0])
        return weight.decode(slice(start, stop))[:, columns].astype(read_dtype)

    return View(weight.shape, read_dtype, read)


def recode_all(
    tensors: Mapping[str, Any],
    leaves: Mapping[str, NamedLeaf],
    targets: Targets,
    dtype: DTypeLike | None,
    recode: bool,
) -> dict[str, Any]:
    """Returns the tensors, with 4-bit weights in a form that `load` can read."""
    result = dict(tensors)
    for leaf in leaves.values():
        names = list(leaf.tensors.ravel())
        is_kernel = leaf.geometry is not None
        if is_kernel and recode:
            result |= {n: _recode(n, result[n], targets, dtype) for n in names}
        # Embeddings are decoded, because only kernels can be packed. All tensors of a
        # stack must have the same packing, and in float they always do.
        is_mixed = recode and len({packing_of(result[name]) for name in names}) > 1
        if not is_kernel or is_mixed:
            packed = [name for name in names if packing_of(tensors[name])]
            result |= {name: decoded_weight(tensors[name], dtype) for name in packed}
    return result


def _recode(
    name: str, weight: Any, targets: Targets, dtype: DTypeLike | None
) -> SliceableTensor | ReblockedWeight | Weight:
    packing, is_target = packing_of(weight), name in targets
    keeps_settings = not is_target or targets[name] == packing
    if packing is None or (keeps_settings and weight.problem is None):
        return weight
    # A target is decoded, because the config then packs it with other settings.
    can_reblock = not is_target and weight.common_block >= SMALLEST_COMMON_BLOCK
    return ReblockedWeight(weight) if can_reblock else decoded_weight(weight, dtype)
