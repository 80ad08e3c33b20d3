"""MLX's 4-bit weights, in the modes affine, mxfp4 and nvfp4."""

# `weight` [N, K / 8] has eight codes per uint32, with the first code in the lowest
# bits, and `scales` are [N, K / B]. In mode affine, weight = code * scale + bias, with
# `biases` [N, K / B]. In modes mxfp4 and nvfp4, codes are E2M1 and a scale is one byte:
# E8M0 for 32 weights, or E4M3 for 16.

from typing import Any

import ml_dtypes
import numpy as np

from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import LazyMatrix
from .file_format import FileFormat, Parts, Settings
from .layouts import INTEGER_FORMATS, swap_nibbles


def _read(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    codes = swap_nibbles(parts.tensor("weight", "uint32"))
    scales = parts.tensor("scales", "uint8", *INTEGER_FORMATS)
    scale_dtype = str(scales.dtype)
    if scale_dtype in INTEGER_FORMATS:
        biases = parts.tensor("biases", scale_dtype)
        message = f"`biases` must be {list(scales.shape)}. Got {list(biases.shape)}."
        require(biases.shape == scales.shape, message)
        fmt, dtype = INTEGER_FORMATS[scale_dtype]
        return {"weight": packed_weight(fmt, dtype, codes, scales, biases=biases)}
    message = "`biases` must be left out if `scales` are uint8. Got some."
    require("biases" not in parts, message)
    if codes.shape[1] * 2 != scales.shape[1] * 16:  # not NVFP4
        return {"weight": packed_weight("mxfp4", "bfloat16", codes, scales)}
    e4m3 = np.dtype(ml_dtypes.float8_e4m3fn)
    as_e4m3 = LazyMatrix(e4m3, scales.shape, lambda *index: scales[index].view(e4m3))
    factors = np.ones(2, np.float32)
    return {"weight": packed_weight("nvfp4", "bfloat16", codes, as_e4m3, factors)}


def _read_settings(settings: Settings) -> dict[str, Any]:
    mode = settings.get("mode", "affine")
    return {**settings, "fmt": settings["fmt"] if mode == "affine" else mode}


MLX = FileFormat(
    marker=r"(.*\.|)weight",
    marker_dtype="uint32",
    parts=("scales", "biases"),
    read=_read,
    methods={"mlx": {"mode": ("affine", "mxfp4", "nvfp4")}},
    read_settings=_read_settings,
)
