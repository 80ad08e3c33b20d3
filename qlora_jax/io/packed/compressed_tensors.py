"""compressed-tensors: pack-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized.

A weight `[N, K]` is `weight_packed`, the first code in the lowest bits, and
`weight_scale` `[N, K / B]`. For integers eight codes are in an int32, and scales are
floats; `weight_shape` is `[N, K]`. For E2M1 two codes are in a byte, and scales in
E8M0, or in E4M3 with a `weight_global_scale`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from .weight import INT4, Maker, PackedWeight, low_first, one_number, packed_weight

_REFUSED = {
    "weight_zero_point": "zero points: the weights must be symmetric",
    "weight_g_idx": "an order of its inputs (act order)",
}
# By the dtypes of codes and scales. The maker decodes E2M1 in bfloat16.
_KINDS = {("int32", dtype): kind for dtype, kind in INT4.items()} | {
    ("uint8", "uint8"): ("mxfp4", "bfloat16"),
    ("uint8", "float8_e4m3fn"): ("nvfp4", "bfloat16"),
}


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    for name, what in _REFUSED.items():
        require(name not in parts, f"`{name}` must be left out. It has {what}.")
    packed, scale = parts["weight_packed"], parts.get("weight_scale")
    require(scale is not None, "`weight_scale` must be given. Got none.")
    assert scale is not None
    kinds = str(packed.dtype), str(scale.dtype)
    require(kinds in _KINDS, f"codes and scales must be of {[*_KINDS]}. Got {kinds}.")
    kind = _KINDS[kinds]
    require(len(packed.shape) == 2, f"codes must have two axes. Got {packed.shape}.")
    codes = low_first(packed)
    if kind[0].startswith("int4"):
        n, k = codes.shape[0], codes.shape[1] * 2
        said = parts.get("weight_shape")
        said = None if said is None else np.asarray(said[...]).tolist()
        message = f"`weight_shape` must be [{n}, {k}], for 4 bits. Got {said}."
        require(said == [n, k], message)
    factors = None
    if kind[0] == "nvfp4":
        factors = np.array([1, one_number(parts, "weight_global_scale")], np.float32)
    is_left = "weight_global_scale" not in parts or factors is not None
    require(is_left, "`weight_global_scale` must be left out. Got one.")
    return {"weight": packed_weight(kind, codes, scale, scale_scales=factors)}


_OTHERS = ("weight_scale", "weight_shape", "weight_global_scale", *_REFUSED)
COMPRESSED_TENSORS = Maker("weight_packed", _OTHERS, _read)
