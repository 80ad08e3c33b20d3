"""Reads 4-bit weights that cannot be moved: in smaller blocks, or in float."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...quant.settings import Packing
from ..named_leaves import NamedLeaf
from .readers import packing_of
from .weight import View

# Smaller blocks are decoded instead.
SMALLEST_COMMON_BLOCK = 16


class ReblockedTensor:
    """A 4-bit weight in blocks so small that each is in one row, with equal values."""

    scale_scales = scale_offset = problem = None
    keeps_dtype = True

    def __init__(self, tensor: Any):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

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


class DecodedTensor(View):
    """A 4-bit weight that is read as floats, a slice at a time."""

    def __init__(self, tensor: Any, dtype: Any = None):
        keeps_dtype = dtype is None or tensor.keeps_dtype
        own = tensor.dtype if keeps_dtype else np.dtype(dtype)

        def read(rows: slice, columns: slice) -> np.ndarray:
            start, stop, _ = rows.indices(tensor.shape[0])
            return tensor.decode(slice(start, stop))[:, columns].astype(own)

        super().__init__(tensor.shape, own, read)


def recode_all(
    tensors: Mapping[str, Any],
    leaves: Mapping[str, NamedLeaf],
    targets: Mapping[str, Packing | None],
    dtype: Any,
    recode: bool,
) -> dict[str, Any]:
    """Returns the tensors, with 4-bit weights in the form that `load` can read.

    Those of leaves that are no kernels, such as embeddings, are decoded. Others are
    changed if `recode`. `targets` has the packing that the config asks for, by name;
    None for float.
    """
    found = dict(tensors)
    for leaf in leaves.values():
        names = list(leaf.tensors.ravel())
        if leaf.geometry is not None and recode:
            found |= {n: _recoded(n, found[n], targets, dtype) for n in names}
        is_mixed = recode and len({packing_of(found[name]) for name in names}) > 1
        if leaf.geometry is None or is_mixed:
            packed = [name for name in names if packing_of(tensors[name])]
            found |= {name: DecodedTensor(tensors[name], dtype) for name in packed}
    return found


def _recoded(
    name: str, x: Any, targets: Mapping[str, Packing | None], dtype: Any
) -> Any:
    is_target = name in targets
    is_moved = not is_target or targets[name] == packing_of(x)
    if packing_of(x) is None or (is_moved and x.problem is None):
        return x
    # A target is decoded: the config packs it in other settings.
    is_blocked = not is_target and x.common_block >= SMALLEST_COMMON_BLOCK
    return ReblockedTensor(x) if is_blocked else DecodedTensor(x, dtype)
