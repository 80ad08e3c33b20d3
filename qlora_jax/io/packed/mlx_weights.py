"""MLX: eight codes to a uint32, the first in the lowest bits.

`weight` `[N, K / 8]` and `scales` `[N, K / B]`. In the mode affine a weight is code
times scale plus `biases` `[N, K / B]`; in the modes mxfp4 and nvfp4, E2M1 times a scale
in E8M0 or E4M3, which are bytes both, for 32 and for 16 weights.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..files import require
from .weight import INT4, Maker, PackedWeight, View, low_first, packed_weight, part


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    codes = low_first(part(parts, "weight", "uint32"))
    scales = part(parts, "scales", " ".join(["uint8", *INT4]))
    if str(scales.dtype) in INT4:
        biases = part(parts, "biases", str(scales.dtype))
        message = f"`biases` must be {list(scales.shape)}. Got {list(biases.shape)}."
        require(biases.shape == scales.shape, message)
        kind = INT4[str(scales.dtype)]
        return {"weight": packed_weight(kind, codes, scales, biases=biases)}
    message = "`biases` must be left out where scales are bytes. Got some."
    require("biases" not in parts, message)
    mode, factors = "mxfp4", None
    if codes.shape[1] * 2 == scales.shape[1] * 16:
        e4m3, stored = np.dtype(ml_dtypes.float8_e4m3fn), scales
        read = lambda rows, columns: stored[rows, columns].view(e4m3)
        mode, scales = "nvfp4", View(scales.shape, e4m3, read)
        factors = np.ones(2, np.float32)
    kind = mode, "bfloat16"
    return {"weight": packed_weight(kind, codes, scales, scale_scales=factors)}


MLX = Maker("weight", ("scales", "biases"), _read, dtype="uint32")
