"""gpt-oss's experts: all of a layer in one tensor.

In MXFP4, in blocks of 32 inputs: `NAME_blocks` `[E, N, K / 32, 16]`, the first of two
codes in the low bits of a byte, and `NAME_scales` `[E, N, K / 32]`, exponents from 127
on. In float: `NAME` `[E, K, N]`. They are E weights `NAME.0`, `NAME.1` ... `[N, K]`, as
other models name their experts, and as tables of names have them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import require
from ..names import Names
from ..tensors import DeferredTensor
from .weight import (
    Maker,
    PackedWeight,
    View,
    low_first,
    packed_weight,
    part,
    transposed,
)


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


def split_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Returns tensors with `NAME.0`, `NAME.1` ... in the place of a `NAME` in float."""
    found = {}
    for name, x in tensors.items():
        if len(x.shape) == 3 and names.is_stack(name):
            parts = (transposed(_matrix(x, i)) for i in range(x.shape[0]))
            found |= {f"{name}.{i}": one for i, one in enumerate(parts)}
        else:
            found[name] = x
    return found


def join_experts(tensors: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Returns tensors with `NAME` in the place of `NAME.0`, `NAME.1` ... in float."""
    found: dict[str, Any] = {}
    stacks: dict[str, list[Any]] = {}
    for name, x in tensors.items():
        stem = name.rpartition(".")[0]
        if names.is_stack(stem):
            found[stem] = None  # its place
            stacks.setdefault(stem, []).append(x)
        else:
            found[name] = x
    for stem, parts in stacks.items():
        make = lambda parts=parts: np.stack([np.asarray(x[:, :]).T for x in parts])
        shape = len(parts), *parts[0].shape[::-1]
        found[stem] = DeferredTensor(parts[0].dtype, shape, make)
    return found


GPT_OSS = Maker("blocks", ("scales",), _read, dtype="uint8", separator="_")
