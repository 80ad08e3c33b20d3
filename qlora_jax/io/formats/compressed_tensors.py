"""compressed-tensors: pack-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized."""

# A weight [N, K] is stored as `weight_packed`, with the first code in the lowest bits,
# and `weight_scale` [N, K / B]. Integer codes are in int32 and have float scales.
# `weight_shape` is [N, K]. E2M1 codes are in bytes. Their scales are E8M0, or E4M3 with
# a `weight_global_scale`. Weights with a `weight_zero_point` or a `weight_g_idx`, the
# block of each input, are rejected.

from typing import Any

import numpy as np

from ...quant.qtensor import QTensor
from ...trees.paths import fused_with, raise_if_any
from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import DeferredTensor
from .file_format import Config, FileFormat, Kernels, Parts, Settings, Writer
from .layouts import (
    INT4_FORMATS,
    INT32,
    INTEGER_FORMATS,
    UINT8,
    dtype_settings,
    integer_scale_dtype,
    swap_nibbles,
)

# Arguments of `packed_weight` by the dtypes of codes and scales. compressed-tensors
# decodes E2M1 to bfloat16.
_FORMATS = {("int32", key): value for key, value in INTEGER_FORMATS.items()}
_FORMATS |= {
    ("uint8", "uint8"): ("mxfp4", "bfloat16"),
    ("uint8", "float8_e4m3fn"): ("nvfp4", "bfloat16"),
}
_UNSUPPORTED_PARTS = ("weight_zero_point", "weight_g_idx")
# For each of our formats: its name in compressed-tensors, the type of the values, the
# dtype of the scales, and the strategy.
_INTEGERS = ("pack-quantized", "int", None, "group")
_SCHEMES = {
    **dict.fromkeys(INT4_FORMATS, _INTEGERS),
    "mxfp4": ("mxfp4-pack-quantized", "float", "torch.uint8", "group"),
    "nvfp4": ("nvfp4-pack-quantized", "float", "torch.float8_e4m3fn", "tensor_group"),
}


def _read(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    require("weight_scale" in parts, "`weight_scale` must be given. Got none.")
    packed, scales = parts["weight_packed"], parts["weight_scale"]
    dtypes = str(packed.dtype), str(scales.dtype)
    message = f"codes and scales must have dtypes {[*_FORMATS]}. Got {dtypes}."
    require(dtypes in _FORMATS, message)
    fmt, dtype = _FORMATS[dtypes]
    require(len(packed.shape) == 2, f"codes must have two axes. Got {packed.shape}.")
    for name in _UNSUPPORTED_PARTS:
        message = f"`{name}` is not supported. Start from the float model."
        require(name not in parts, message)
    has_factor = "weight_global_scale" in parts
    message = f"`weight_global_scale` must be left out for {fmt}. Got one."
    require(fmt == "nvfp4" or not has_factor, message)
    codes, factors = swap_nibbles(packed), None
    if fmt == "nvfp4":
        factors = np.array([1, parts.scalar("weight_global_scale")], np.float32)
    elif fmt != "mxfp4":
        _check_shape(parts, codes.shape[0], codes.shape[1] * 2)
    return {"weight": packed_weight(fmt, dtype, codes, scales, factors)}


def _check_shape(parts: Parts, n: int, k: int) -> None:
    stored = parts.get("weight_shape")
    shape = None if stored is None else np.asarray(stored[...]).tolist()
    # Report the number of bits if another number explains the length of the rows.
    if isinstance(shape, list) and len(shape) == 2 and shape[0] == n and shape[1] > 0:
        bits = 4 * k / shape[1]
        message = f"`weight_packed` must have codes of 4 bits. Got {bits:.0f} bits."
        require(bits not in (1, 2, 3, 5, 6, 8), message)
    message = f"`weight_shape` must be [{n}, {k}], for 4 bits. Got {shape}."
    require(shape == [n, k], message)


def _read_settings(settings: Settings) -> dict[str, Any]:
    groups = settings.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        section = group if isinstance(group, dict) else {}
        kinds = ("input_activations", "output_activations")
        has_activations = any(section.get(kind) for kind in kinds)
        message = f"{name} must quantize only weights, not activations. Got {group}."
        require(not has_activations, message)
    # Other formats, such as pack-quantized, store integers.
    e2m1_formats = {_SCHEMES[fmt][0]: fmt for fmt in ("mxfp4", "nvfp4")}
    fmt = e2m1_formats.get(str(settings.get("format")), settings["fmt"])
    return {**settings, "fmt": fmt}


def _tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    is_int = q.fmt in INT4_FORMATS
    word = INT32 if is_int else UINT8
    scale_dtype = integer_scale_dtype(q) if is_int else np.dtype(q.scales.dtype)

    def pack_words() -> np.ndarray:
        # [K / 2, N] -> [N, K / 2], with the first code of each byte in the low bits
        packed = np.asarray(q.codes).T
        return np.ascontiguousarray(packed >> 4 | packed << 4).view(word)

    scales = DeferredTensor(
        scale_dtype,
        (n, k // q.block_size),
        lambda: np.asarray(q.scales).T.astype(scale_dtype),
    )
    codes = DeferredTensor(word, (n, k // 2 // word.itemsize), pack_words)
    tensors: dict[str, Any] = {f"{name}_packed": codes, f"{name}_scale": scales}
    if is_int:
        tensors[f"{name}_shape"] = np.array([n, k])
    if q.fmt == "nvfp4":
        factor, divisor = np.asarray(q.scale_scales)
        tensors[f"{name}_global_scale"] = (divisor / factor)[None]
    return tensors


def _config(
    kernels: Kernels, float_modules: list[str], config: Config
) -> dict[str, Any]:
    q = next(iter(kernels.values()))
    if q.fmt == "nvfp4":
        _check_fused_factors(kernels)
    format_name, value_type, scale_dtype, strategy = _SCHEMES[q.fmt]
    weights = dict(num_bits=4, type=value_type, symmetric=True, strategy=strategy)
    weights |= dict(group_size=q.block_size, dynamic=False, scale_dtype=scale_dtype)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": format_name}
    settings |= {"quantization_status": "compressed", "ignore": float_modules}
    settings |= {"config_groups": {"group_0": group}}
    return {"quantization_config": settings, **dtype_settings(kernels, config)}


def _check_fused_factors(kernels: Kernels) -> None:
    """Raises if weights that vLLM fuses, such as q, k and v, have different factors."""
    factors = {name: tuple(np.asarray(q.scale_scales)) for name, q in kernels.items()}
    pairs = [(a, b) for a in factors for b in fused_with(a) if b in factors]
    differing = [f"{a}, {b}" for a, b in pairs if factors[a] != factors[b]]
    title = "vLLM uses one float32 factor for both of these weights, but theirs "
    raise_if_any(title + "differ: pack them as one tree", differing)


COMPRESSED_TENSORS = FileFormat(
    marker=r"(.*\.|)weight_packed",
    parts=(
        "weight_scale",
        "weight_shape",
        "weight_global_scale",
        *_UNSUPPORTED_PARTS,
    ),
    read=_read,
    methods={"compressed-tensors": {}},
    read_settings=_read_settings,
    write=Writer("compressed-tensors", tuple(_SCHEMES), _tensors, _config),
)
