"""Reads the settings of a model folder's packed weights."""

import pathlib
from collections.abc import Iterator
from typing import Any

from ..files import Path, member, read_json, require
from ..model_folder import read_config_json

# The settings of each maker that change what is stored, with what is read, the default
# first.
_READ: dict[str, dict[str, tuple]] = {
    "bitsandbytes": {},
    "compressed-tensors": {},
    "awq": {"version": ("gemm",)},
    "gptq": {"checkpoint_format": ("gptq", "gptq_v2")},
    "modelopt": {"quant_algo": ("NVFP4", "W4A16_NVFP4"), "group_size": (16,)},
    "mxfp4": {},
    "mlx": {"mode": ("affine", "mxfp4", "nvfp4")},
}
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme", "meta")
# Formats by their names there; all others are int4_f16.
_FORMATS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
_FORMATS |= {"modelopt": "nvfp4", "nvfp4": "nvfp4", "mxfp4": "mxfp4"}


def read_quantization(folder: Path) -> dict[str, Any]:
    """Returns what a model's config says of its packed weights.

    Args:
        folder: The model's folder.

    Returns:
        The `quantization_config` of its `config.json` (`quantization` of MLX's, and
        `hf_quant_config.json` of ModelOpt), with the `quant_method` and the `fmt` of
        the weights; {} for a model in float.

    Raises:
        CheckpointError: If weights are packed in a way that is not read.

    Example:
        >>> import pathlib, tempfile, qlora_jax as ql
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> text = '{"quantization_config": {"quant_method": "awq", "bits": 4}}'
        >>> _ = (folder / "config.json").write_text(text)
        >>> ql.io.read_quantization(folder)["fmt"]
        'int4_f16'
    """
    if not (pathlib.Path(folder) / "config.json").exists():
        return {}
    found = _said(pathlib.Path(folder))
    if not found:
        return {}
    require(isinstance(found, dict), "`quantization_config` must be a JSON object.")
    usual = "mlx" if "group_size" in found else "bitsandbytes"
    method = found.get("quant_method", usual)
    is_known = isinstance(method, str) and method in _READ
    names = ", ".join(_READ)
    require(is_known, f"`quant_method` must be one of {names}. Got {method!r:.80}.")
    settings = _same_names({**found, "quant_method": method})
    for key, allowed in _READ[method].items():
        value = settings.get(key, allowed[0])
        message = f"`{key}` of {method} must be {' or '.join(map(str, allowed))}."
        require(value in allowed, f"{message} Got {value!r:.80}.")
    is_8bit = method == "bitsandbytes" and settings.get("load_in_8bit")
    require(not is_8bit, "`load_in_8bit` must be false: 8 bits are not read. Got true.")
    others = [f"`{key}` is {bits!r:.80}" for key, bits in _other_bits(settings)]
    message = f"weights of {method} must have 4 bits. Got {', '.join(others[:5])}."
    require(not others, message)
    if method == "compressed-tensors":
        _check_activations(settings.get("config_groups"))
    if method == "bitsandbytes":
        return settings | {"fmt": settings.get("bnb_4bit_quant_type", "fp4")}
    kind = {"compressed-tensors": "format", "mlx": "mode"}.get(method, "quant_method")
    return settings | {"fmt": _FORMATS.get(str(settings.get(kind)), "int4_f16")}


def _said(folder: pathlib.Path) -> Any:
    raw = read_config_json(folder)
    inner = raw.get("text_config")
    for config in (raw, inner if isinstance(inner, dict) else {}):
        for name in ("quantization_config", "quantization"):
            if config.get(name):
                return config[name]
    if not (folder / "hf_quant_config.json").exists():
        return None
    said = read_json(member(folder, "hf_quant_config.json")).get("quantization")
    require(isinstance(said, dict), "`quantization` must be a JSON object.")
    return {**said, "quant_method": "modelopt"} if said else None


def _same_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings under the names that files had first."""
    known = {"awq": "version", "gptq": "checkpoint_format"}
    name = known.get(settings["quant_method"], "")
    found = settings.get(name, settings.get("format"))
    if settings.get("backend") == "llm-awq":  # transformers' name for that version
        found = "llm-awq"
    return settings | ({name: str(found).lower()} if name and found else {})


def _other_bits(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the numbers of bits other than 4 of weights or modules, by their keys."""
    for key, value in settings.items():
        if isinstance(value, dict) and key not in _NOT_WEIGHTS:
            yield from ((f"{key}.{end}", bits) for end, bits in _other_bits(value))
        elif key in ("bits", "num_bits") and value not in (4, None):
            yield key, value


def _check_activations(groups: Any) -> None:
    for name, group in groups.items() if isinstance(groups, dict) else ():
        said = group if isinstance(group, dict) else {}
        is_alone = not (said.get("input_activations") or said.get("output_activations"))
        require(is_alone, f"{name} must quantize weights alone. Got {group}.")
