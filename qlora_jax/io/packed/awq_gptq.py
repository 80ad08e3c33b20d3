"""AWQ (the gemm version) and GPTQ: integers from 0 to 15 less a zero, times a scale.

Both have `scales` `[K / B, N]` and `qzeros` `[K / B, N / 8]`, eight to a word. AWQ
packs outputs, `qweight` `[K, N / 8]`, in an order of its own; GPTQ packs inputs,
`qweight` `[K / 8, N]`, and `g_idx` has the block of each input. The first version of
GPTQ's files stores zeros less one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from .weight import (
    INT4,
    Maker,
    PackedWeight,
    View,
    check_bits,
    low_first,
    nibbles,
    order_of,
    packed_weight,
    part,
    transposed,
    zero_biases,
)

# Of eight outputs, the place in AWQ's word, from the lowest bits.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def _outputs_first(words: Any) -> View:
    """Returns the codes of AWQ's words."""
    k, count = words.shape

    def read(rows: slice, columns: slice) -> np.ndarray:
        first, last = rows.start // 8, -(-min(rows.stop, count * 8) // 8)
        inputs = slice(columns.start * 2, columns.stop * 2)
        found = nibbles(np.asarray(words[inputs, first:last]), _PLACES)
        found = found[:, rows.start - first * 8 :][:, : rows.stop - rows.start]
        return (found[::2] << 4 | found[1::2]).T

    return View((count * 8, k // 2), np.dtype(np.uint8), read)


def _read(
    parts: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, PackedWeight]:
    words, zeros = part(parts, "qweight", "int32"), part(parts, "qzeros", "int32")
    scales = part(parts, "scales", "float16 bfloat16")
    blocks, n = scales.shape
    check_bits("qzeros", zeros, n)
    own = {"awq": n // 8, "gptq": n}  # words in a row
    methods = [m for m, count in own.items() if words.shape[1] == count]
    method = settings.get("quant_method", next(iter(methods), None))
    message = f"`qweight` must be [K / 8, {n}], or for AWQ [K, {n} / 8]. Got "
    require(method in methods, f"{message}{list(words.shape)}.")
    is_awq = method == "awq"
    k = words.shape[0] * (1 if is_awq else 8)
    message = f"`qzeros` must be [{blocks}, {n} / 8]. Got {list(zeros.shape)}."
    require(tuple(zeros.shape) == (blocks, n // 8) and n % 8 == 0, message)
    require(k % 2 == 0, f"`qweight` must have an even number of inputs. Got {k}.")
    codes = _outputs_first(words) if is_awq else low_first(transposed(words))
    # The sum carries from nibble to nibble, as GPTQModel's does.
    is_less = not is_awq and settings.get("checkpoint_format", "gptq") == "gptq"
    scales = transposed(scales)
    how = (_PLACES, 0) if is_awq else (slice(None), 0x11111111 * is_less)
    is_ordered = "g_idx" in parts or not settings.get("desc_act")
    message = "`g_idx` must be given, as `desc_act` is true. Got none."
    require(is_awq or is_ordered, message)
    order = None if is_awq else order_of(parts, "g_idx", k, blocks)
    biases = zero_biases(zeros, scales, *how)
    kind = INT4[str(scales.dtype)]
    return {"weight": packed_weight(kind, codes, scales, biases=biases, order=order)}


AWQ_GPTQ = Maker("qweight", ("qzeros", "scales", "g_idx"), _read)
