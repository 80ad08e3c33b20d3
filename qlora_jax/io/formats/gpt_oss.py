"""gpt-oss's MXFP4: all experts of a layer are stored together."""

# They are `NAME_blocks` [E, N, K / 32, 16], with the first code in the low bits, and
# `NAME_scales` [E, N, K / 32] in E8M0. Here they become weights [N, K] called `NAME.0`,
# `NAME.1` ..., as in other models and in name tables. `split_experts` in
# named_leaves.py does the same for experts in float.

from ..files import require
from ..stored_weight import PackedWeight, packed_weight
from ..tensors import matrix_in_stack
from .file_format import FileFormat, Parts, Settings
from .layouts import swap_nibbles


def _read(parts: Parts, _: Settings) -> dict[str, PackedWeight]:
    blocks = parts.tensor("blocks", "uint8", axes=4)
    scales = parts.tensor("scales", "uint8", axes=3)
    *shape, block_bytes = blocks.shape
    message = f"`scales` must be {shape} and `blocks` have 16 bytes each. Got "
    message += f"{list(scales.shape)} and {list(blocks.shape)}."
    require(list(scales.shape) == shape and block_bytes == 16, message)
    num_experts, n, num_blocks = shape
    codes = blocks.reshape(num_experts, n, num_blocks * 16)  # [E, N, K / 2]
    weights = {}
    for i in range(num_experts):
        arrays = swap_nibbles(matrix_in_stack(codes, i)), matrix_in_stack(scales, i)
        weights[f".{i}"] = packed_weight("mxfp4", "bfloat16", *arrays)
    return weights


GPT_OSS = FileFormat(
    marker="(.*)_blocks",
    marker_dtype="uint8",
    parts=("_scales",),
    read=_read,
    methods={"mxfp4": {}},
    fmt="mxfp4",
)
