"""gpt-oss's MXFP4: all experts of a layer in one tensor, in blocks of 32 inputs.

`NAME_blocks` `[E, N, K / 32, 16]`, the first of two codes in the low bits of a byte,
and `NAME_scales` `[E, N, K / 32]`, exponents from 127 on. They are E weights `NAME.0`,
`NAME.1` ... `[N, K]`, as other models name their experts.
"""

from collections.abc import Mapping
from typing import Any

from ..files import require
from .weight import Maker, PackedWeight, View, low_first, packed_weight, part


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    blocks = part(parts, "blocks", "uint8", axes=4)
    scales = part(parts, "scales", "uint8", axes=3)
    message = "`scales` must be {} and `blocks` have 16 bytes each. Got {} and {}."
    *shape, size = blocks.shape
    found = list(scales.shape), list(blocks.shape)
    require(list(scales.shape) == shape and size == 16, message.format(shape, *found))
    count, n, k = shape[0], shape[1], shape[2] * 32
    codes = blocks.reshape(count, n, k // 2)
    kind = "mxfp4", "bfloat16"

    def expert(index: int) -> PackedWeight:
        of = lambda x: _matrix(x, index)
        return packed_weight(kind, low_first(of(codes)), of(scales))

    return {f".{index}": expert(index) for index in range(count)}


def _matrix(x: Any, index: int) -> View:
    read = lambda rows, columns: x[index : index + 1, rows, columns][0]
    return View(tuple(x.shape[1:]), x.dtype, read)


GPT_OSS = Maker("blocks", ("scales",), _read, dtype="uint8", separator="_")
