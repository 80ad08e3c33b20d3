"""Reads 4-bit weights whose blocks cross rows: in smaller blocks, or in float."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quant.settings import Packing
from ..packed_tensors import packing_of
from .packed import PackedTensor

# Smaller blocks are decoded instead.
SMALLEST_COMMON_BLOCK = 16


class _View:
    """A 4-bit weight `[N, K]` that is read in another form."""

    def __init__(self, tensor: PackedTensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype


class ReblockedTensor(_View):
    """A 4-bit weight in blocks so small that each is in one row, with equal values."""

    scale_scales = scale_offset = None
    is_in_rows = keeps_dtype = True

    @property
    def packing(self) -> Packing:
        """Its format, with smaller blocks and float32 scales."""
        packing = self.tensor.packing
        return Packing(packing.fmt, self.tensor.common_block, False)

    def rows(self) -> tuple[Any, Any]:
        """Returns codes `[N, K / 2]` and scales `[N, K / B]`, which repeat."""
        tensor, (n, k) = self.tensor, self.shape
        size, small = tensor.packing.block_size, self.packing.block_size
        scales = tensor.float_scales(slice(0, -(-n * k // size)))
        place = np.arange(n * k // small) * small // size
        return tensor.codes.reshape(n, k // 2), scales[place].reshape(n, -1)


class DecodedTensor(_View):
    """A 4-bit weight that is read as floats, a slice at a time."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        start, stop, _ = rows.indices(self.shape[0])
        return self.tensor.decode(slice(start, stop))[:, columns]


def recode_all(
    tensors: Mapping[str, Any], targets: Mapping[str, Packing | None]
) -> dict[str, Any]:
    """Returns the tensors, with 4-bit weights in the form that `load` can read.

    `targets` has the packing that the config asks for, by name; None for float.
    """

    def recoded(name: str, x: PackedTensor) -> Any:
        is_target = name in targets
        if x.is_in_rows and (not is_target or targets[name] == x.packing):
            return x
        # A target is decoded: the config packs it in other settings.
        is_blocked = not is_target and x.common_block >= SMALLEST_COMMON_BLOCK
        return ReblockedTensor(x) if is_blocked else DecodedTensor(x)

    packed = {n: x for n, x in tensors.items() if packing_of(x)}
    return {**tensors, **{name: recoded(name, x) for name, x in packed.items()}}
