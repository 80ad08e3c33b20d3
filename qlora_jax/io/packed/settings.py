"""What a model's folder says of its packed weights."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ..files import Path, member, read_json, require
from ..model_folder import read_config_json

_COMPRESSED = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
_WORDS = {"bits": (4,), "pack_dtype": ("int32",)}
# The settings of each maker that change what is stored, with what is read, the default
# first.
_ALLOWED: dict[str, dict[str, tuple]] = {
    "bitsandbytes": {},
    "compressed-tensors": {},
    "awq": {**_WORDS, "version": ("gemm",)},
    "gptq": {
        **_WORDS,
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
    },
    "modelopt": {"quant_algo": ("NVFP4", "W4A16_NVFP4"), "group_size": (16,)},
    "mxfp4": {},
    "mlx": {"bits": (4,), "mode": ("affine", "mxfp4", "nvfp4")},
}


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
    is_known = isinstance(method, str) and method in _ALLOWED
    names = ", ".join(_ALLOWED)
    require(is_known, f"`quant_method` must be one of {names}. Got {method!r:.80}.")
    settings = _same_names({**found, "quant_method": method})
    for key, allowed in _ALLOWED[method].items():
        value = settings.get(key, allowed[0])
        is_read = any(value == x for x in allowed)
        message = f"`{key}` of {method} must be {' or '.join(map(str, allowed))}."
        require(is_read, f"{message} Got {value!r:.80}.")
    if method == "compressed-tensors":
        _check_activations(settings)
    return settings | {"fmt": _fmt(settings)}


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
    name = {"awq": "version", "gptq": "checkpoint_format"}.get(settings["quant_method"])
    if name is None:
        return settings
    found = settings.get(name, settings.get("format"))
    if settings.get("backend") == "llm-awq":  # transformers' name for that version
        found = "llm-awq"
    more = {} if found is None else {name: str(found).lower()}
    return settings | more


def _check_activations(settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups") or {}
    require(isinstance(groups, dict), "`config_groups` must be a JSON object.")
    for name, group in groups.items():
        is_found = isinstance(group, dict)
        require(is_found, f"`config_groups` must hold JSON objects. Got {group!r:.80}.")
        is_alone = not (
            group.get("input_activations") or group.get("output_activations")
        )
        require(is_alone, f"{name} must quantize weights alone. Got {group}.")


def _fmt(settings: Mapping[str, Any]) -> str:
    method = settings["quant_method"]
    if method == "bitsandbytes":
        return settings.get("bnb_4bit_quant_type", "fp4")
    if method == "compressed-tensors":
        return _COMPRESSED.get(str(settings.get("format")), "int4_f16")
    if method == "mlx":
        mode = settings.get("mode", "affine")
        return "int4_f16" if mode == "affine" else mode
    return {"modelopt": "nvfp4", "mxfp4": "mxfp4"}.get(method, "int4_f16")
