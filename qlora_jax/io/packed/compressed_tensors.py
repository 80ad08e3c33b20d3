"""compressed-tensors: pack-quantized, mxfp4-pack-quantized and nvfp4-pack-quantized.

A weight `[N, K]` is `weight_packed`, the first code in the lowest bits, and
`weight_scale` `[N, K / B]`. For integers eight codes are in an int32, and scales are
floats; `weight_shape` is `[N, K]`, and there may be a `weight_zero_point`
`[N / 8, K / B]` and a `weight_g_idx` `[K]`. For E2M1 two codes are in a byte, and
scales in E8M0, or in E4M3 with a `weight_global_scale`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from .weight import (
    INT4,
    Maker,
    PackedWeight,
    check_bits,
    low_first,
    one_number,
    order_of,
    packed_weight,
    part,
    transposed,
    zero_biases,
)

# By the dtypes of codes and scales. The library decodes E2M1 in bfloat16.
_KINDS = {("int32", dtype): kind for dtype, kind in INT4.items()} | {
    ("uint8", "uint8"): ("mxfp4", "bfloat16"),
    ("uint8", "float8_e4m3fn"): ("nvfp4", "bfloat16"),
}


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    require("weight_scale" in parts, "`weight_scale` must be given. Got none.")
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    kinds = str(packed.dtype), str(scale.dtype)
    require(kinds in _KINDS, f"codes and scales must be of {[*_KINDS]}. Got {kinds}.")
    kind = _KINDS[kinds]
    require(len(packed.shape) == 2, f"codes must have two axes. Got {packed.shape}.")
    of_fmt = {"nvfp4": ("weight_global_scale",), "mxfp4": ()}.get(kind[0], _OF_INT4)
    for name in [x for x in _OPTIONAL if x not in of_fmt]:
        require(name not in parts, f"`{name}` must be left out. Got one.")
    codes, more = low_first(packed), {}
    if kind[0] == "nvfp4":
        divisor = one_number(parts, "weight_global_scale")
        more = {"scale_scales": np.array([1, divisor], np.float32)}
    elif kind[0] != "mxfp4":
        more = _of_int4(parts, codes.shape[0], codes.shape[1] * 2, scale)
    return {"weight": packed_weight(kind, codes, scale, **more)}


def _of_int4(parts: Mapping[str, Any], n: int, k: int, scale: Any) -> dict[str, Any]:
    said = parts.get("weight_shape")
    said = None if said is None else np.asarray(said[...]).tolist()
    if isinstance(said, list) and len(said) == 2 and said[0] == n and said[1] > 0:
        check_bits("weight_packed", parts["weight_packed"], said[1])
    message = f"`weight_shape` must be [{n}, {k}], for 4 bits. Got {said}."
    require(said == [n, k], message)
    order = order_of(parts, "weight_g_idx", k, (0, *scale.shape)[-1])
    if "weight_zero_point" not in parts:
        return {"order": order}
    zeros = part(parts, "weight_zero_point", "int32")
    shape = [-(-n // 8), *scale.shape[1:]]
    message = f"`weight_zero_point` must be {shape}. Got {list(zeros.shape)}."
    require(list(zeros.shape) == shape, message)
    return {"order": order, "biases": zero_biases(transposed(zeros), scale)}


_OF_INT4 = ("weight_zero_point", "weight_g_idx")
_OPTIONAL = ("weight_global_scale", *_OF_INT4)
_OTHERS = ("weight_scale", "weight_shape", *_OPTIONAL)
COMPRESSED_TENSORS = Maker("weight_packed", _OTHERS, _read)
