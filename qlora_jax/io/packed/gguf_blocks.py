"""GGUF's Q4_0 and MXFP4: for 32 inputs a scale and 16 bytes.

A row of `weight_q4_0` `[N, 18 * K / 32]` has the blocks of an output, each with a
float16 scale; one of `NAME_mxfp4` `[N, 17 * K / 32]` those with an exponent from 127
on. The low half of byte i is the code of input i, the high half that of input i + 16.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from .weight import Maker, PackedWeight, View, packed_weight, part


def _maker(
    name: str, end: str, kind: tuple[str, str], scale: Any, **more: Any
) -> Maker:
    def read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
        del settings
        return {end: _weight(parts, name, kind, scale)}

    return Maker(name, (), read, **more)


def _weight(
    parts: Mapping[str, Any], name: str, kind: tuple[str, str], scale: Any
) -> PackedWeight:
    stored, head = part(parts, name, "uint8"), np.dtype(scale).itemsize
    size = head + 16  # of a block
    n, count = stored.shape[0], stored.shape[1] // size
    message = f"`{name}` must be whole blocks of {size} bytes. Got {stored.shape}."
    require(stored.shape[1] == count * size, message)

    def blocks(rows: slice, columns: slice) -> np.ndarray:
        place = slice(columns.start * size, columns.stop * size)
        found = np.asarray(stored[rows, place])
        return found.reshape(len(found), -1, size)

    def codes(rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // 16, -(-columns.stop // 16)
        found = blocks(rows, slice(first, last))[..., head:]
        found = np.concatenate([found & 15, found >> 4], axis=-1)
        found = (found[..., ::2] << 4 | found[..., 1::2]).reshape(len(found), -1)
        return found[:, columns.start - first * 16 : columns.stop - first * 16]

    def scales(rows: slice, columns: slice) -> np.ndarray:
        found = np.ascontiguousarray(blocks(rows, columns)[..., :head])
        return found.view(scale)[..., 0]

    views = (
        View((n, count * 16), np.dtype(np.uint8), codes),
        View((n, count), np.dtype(scale), scales),
    )
    return packed_weight(kind, *views)


Q4_0 = _maker("weight_q4_0", "weight", ("q4_0", "float32"), np.float16)
MXFP4 = _maker("mxfp4", "", ("mxfp4", "bfloat16"), np.uint8, separator="_")
