"""ModelOpt's NVFP4."""

# A weight is stored as `weight` [N, K / 2] with two codes per byte, `weight_scale`
# [N, K / 16] in E4M3, and the factor `weight_scale_2`. The scales of activations and
# key-value caches are ignored, because both stay in float here. Servers may also keep
# them in float.

import numpy as np

from ..stored_weight import PackedWeight, packed_weight
from .file_format import FileFormat, Parts, Settings
from .layouts import swap_nibbles


def _read(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    codes = swap_nibbles(parts.tensor("weight", "uint8"))
    scales = parts.tensor("weight_scale", "float8_e4m3fn")
    factors = np.array([parts.scalar("weight_scale_2"), 1], np.float32)
    return {"weight": packed_weight("nvfp4", "bfloat16", codes, scales, factors)}


MODELOPT = FileFormat(
    marker=r"(.*\.|)weight_scale_2",
    parts=("weight", "weight_scale"),
    ignored=("input_scale", "k_scale", "v_scale"),
    read=_read,
    methods={"modelopt": {"quant_algo": ("NVFP4", "W4A16_NVFP4"), "group_size": (16,)}},
    fmt="nvfp4",
)
