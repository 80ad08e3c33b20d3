"""Q4_0 and MXFP4 of GGUF: blocks of 32 inputs, a scale and 16 bytes of codes each."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

import qlora_jax as ql

BLOCK = 32
LAYERS = r"layers/(?!.*/router/).*/kernel"  # what is packed
_FORMATS = ("int4_f16", "q4_0")  # of these codes and scales


def in_q4_0(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves, by path, with all layers' kernels packed; lists those it lacks.

    Kernels in float are packed by the rule of llama.cpp, but those of routers.
    """
    found, problems = dict(leaves), []
    for path, x in leaves.items():
        if isinstance(x, ql.QTensor):
            if x.fmt not in _FORMATS or x.block_size != BLOCK:
                problems.append(f"{path}: {x.fmt} in blocks of {x.block_size}")
        elif re.fullmatch(LAYERS, path):
            if x.shape[-2] % BLOCK == 0:
                found[path] = ql.quantize(x, "q4_0")
    if problems:
        raise ValueError(
            f"packed kernels must be {' or '.join(_FORMATS)} in blocks of {BLOCK} for "
            "Q4_0, which would pack others again: write F16, which decodes them. Got "
            f"{'; '.join(sorted(problems))}."
        )
    return found


def block_rows(
    q: "ql.QTensor", index: tuple[int, ...], columns: slice
) -> UInt8[np.ndarray, "*experts n bytes"]:
    """Returns the bytes of a `[*experts, K, N]` of a stack, a row for each column."""
    parts = (np.asarray(x[index])[..., columns] for x in (q.codes, q.scales))
    packed, scales = (x.swapaxes(-1, -2) for x in parts)
    codes = np.stack([packed >> 4, packed & 15], axis=-1)
    codes = codes.reshape(*scales.shape, 2, BLOCK // 2)
    # A byte has code i in its low half, and code i + 16.
    halves = codes[..., 0, :] | codes[..., 1, :] << 4
    scales = np.ascontiguousarray(scales)[..., None].view(np.uint8)
    return np.concatenate([scales, halves], axis=-1).reshape(*packed.shape[:-1], -1)
