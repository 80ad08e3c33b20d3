"""ModelOpt's NVFP4: two codes a byte, scales in E4M3, and a float32 that multiplies.

`weight` `[N, K / 2]`, `weight_scale` `[N, K / 16]`, `weight_scale_2`. What it has for
activations and the cache of keys and values, whose quantization servers may leave out
as well, is left out: `input_scale`, `k_scale`, `v_scale`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .weight import Maker, PackedWeight, low_first, one_number, packed_weight, part


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    codes = low_first(part(parts, "weight", "uint8"))
    scales = part(parts, "weight_scale", "float8_e4m3fn")
    factors = np.array([one_number(parts, "weight_scale_2"), 1], np.float32)
    kind = "nvfp4", "bfloat16"
    return {"weight": packed_weight(kind, codes, scales, scale_scales=factors)}


_LEFT_OUT = ("input_scale", "k_scale", "v_scale")
_OTHERS = ("weight", "weight_scale")
MODELOPT = Maker("weight_scale_2", _OTHERS, _read, left_out=_LEFT_OUT)
