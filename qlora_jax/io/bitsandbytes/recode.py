"""4-bit weights whose blocks cross rows: in smaller blocks, or in float."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...quant.settings import Packing
from .packed import PackedTensor

SMALLEST_BLOCK = 16


@dataclass(frozen=True, eq=False)
class _View:
    """A 4-bit weight that is read in another form.

    Attributes:
        tensor: The weight in the checkpoint.
    """

    tensor: PackedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`."""
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype that it was packed from."""
        return self.tensor.dtype


class ReblockedTensor(_View):
    """A 4-bit weight in blocks so small that each is in one row.

    Its scales are those of the larger blocks, repeated, so that its values are the
    same to the bit. They are held in float32.
    """

    scale_scales = scale_offset = None

    @property
    def packing(self) -> Packing:
        """Its format and smaller blocks; its scales are not quantized."""
        packing = self.tensor.packing
        return Packing(packing.fmt, self.tensor.common_block, False)

    def rows(self) -> tuple[Any, Any]:
        """Returns codes `[N, K / 2]` and scales `[N, K / B]`."""
        tensor, (n, k) = self.tensor, self.shape
        size, small = tensor.packing.block_size, self.packing.block_size
        scales = tensor.float_scales(slice(0, -(-n * k // size)))
        place = np.arange(n * k // small) * small // size
        return tensor.codes.reshape(n, k // 2), scales[place].reshape(n, -1)


class DecodedTensor(_View):
    """A 4-bit weight that is read as floats, a slice at a time."""

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, columns = index
        n = self.shape[0]
        start, stop, _ = rows.indices(n)
        return self.tensor.decode(slice(start, stop))[:, columns]


def recoded(tensor: PackedTensor, is_target: bool, packing: Packing | None) -> Any:
    """Returns a weight as it is to be read.

    Args:
        tensor: The weight in the checkpoint.
        is_target: Whether a config says how it is packed.
        packing: How; None for a target that stays in float.

    Returns:
        The weight itself where its bytes can be moved. Otherwise, in float where the
        config packs it in another way, or where no block of at least 16 weights is in
        one row; else in smaller blocks.
    """
    if tensor.is_in_rows and (not is_target or packing == tensor.packing):
        return tensor
    if not is_target and tensor.common_block >= SMALLEST_BLOCK:
        return ReblockedTensor(tensor)
    return DecodedTensor(tensor)


def recode_all(
    tensors: Mapping[str, Any], targets: Mapping[str, Packing | None]
) -> dict[str, Any]:
    """Returns the tensors, the packed ones as `recoded`.

    Args:
        tensors: By name.
        targets: How the config packs its targets' tensors, by name.
    """
    return {
        name: recoded(x, name in targets, targets.get(name))
        if isinstance(x, PackedTensor)
        else x
        for name, x in tensors.items()
    }
