"""GGUF's Q4_0: for 32 inputs a float16 scale and 16 bytes.

A row of `weight_q4_0` `[N, 18 * K / 32]` has the blocks of an output. The low half of
byte i is the code of input i, the high half that of input i + 16.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from .weight import Maker, PackedWeight, View, packed_weight, part

_BYTES = 18  # of a block


def _read(parts: Mapping[str, Any], settings: Any) -> dict[str, PackedWeight]:
    del settings
    stored = part(parts, "weight_q4_0", "uint8")
    n, count = stored.shape[0], stored.shape[1] // _BYTES
    message = (
        f"`weight_q4_0` must be whole blocks of {_BYTES} bytes. Got {stored.shape}."
    )
    require(stored.shape[1] == count * _BYTES, message)

    def blocks(rows: slice, columns: slice) -> np.ndarray:
        place = slice(columns.start * _BYTES, columns.stop * _BYTES)
        found = np.asarray(stored[rows, place])
        return found.reshape(len(found), -1, _BYTES)

    def codes(rows: slice, columns: slice) -> np.ndarray:
        first, last = columns.start // 16, -(-columns.stop // 16)
        found = blocks(rows, slice(first, last))[..., 2:]
        found = np.concatenate([found & 15, found >> 4], axis=-1)
        found = (found[..., ::2] << 4 | found[..., 1::2]).reshape(len(found), -1)
        return found[:, columns.start - first * 16 : columns.stop - first * 16]

    def scales(rows: slice, columns: slice) -> np.ndarray:
        found = np.ascontiguousarray(blocks(rows, columns)[..., :2])
        return found.view(np.float16)[..., 0]

    views = (
        View((n, count * 16), np.dtype(np.uint8), codes),
        View((n, count), np.dtype(np.float16), scales),
    )
    return {"weight": packed_weight(("q4_0", "float32"), *views)}


Q4_0 = Maker("weight_q4_0", (), _read)
