"""Weights that are packed in the files of a checkpoint."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from ..quant.formats import Packing, get_format
from .files import require
from .tensors import LazyMatrix, SliceableTensor


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A 4-bit weight `[N, K]` in a file; each subclass is one way to store its parts.

    Every weight can be decoded. A `QTensor` can hold its bytes if `problem` is None.
    """

    shape: tuple[int, int]
    dtype: np.dtype  # of the decoded weight
    packing: Packing
    codes: SliceableTensor  # uint8, two codes to a byte
    scales: SliceableTensor  # one for each block, in the dtype of the file
    scale_scales: np.ndarray | None = None  # as in a `QTensor`
    scale_offset: np.float32 | None = None
    keeps_dtype: bool = False  # whether the argument `dtype` of `load` has no effect
    name: str = ""

    @property
    def problem(self) -> str | None:
        """Why a `QTensor` cannot hold its bytes; None if it can.

        The reason follows the name of the weight in messages: "has blocks of ...".
        """
        return None

    def codes_and_scales(self) -> tuple[SliceableTensor, SliceableTensor]:
        """Returns the codes `[N, K / 2]` and scales `[N, K / B]`, for a `QTensor`."""
        raise NotImplementedError

    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight; the slice has a start and a stop."""
        raise NotImplementedError

    def reblocked(self) -> "StoredWeight | None":
        """Returns the same values in blocks that a `QTensor` can hold, if possible."""
        return None


def packing_of(tensor: object) -> Packing | None:
    """Returns how a tensor is packed in its file, or None if it is not packed."""
    return tensor.packing if isinstance(tensor, StoredWeight) else None


def in_float(tensor: Any, dtype: DTypeLike | None = None) -> Any:
    """Returns a tensor whose values are floats; packed weights decode when sliced."""
    if not isinstance(tensor, StoredWeight):
        return tensor
    keeps_dtype = dtype is None or tensor.keeps_dtype
    read_dtype = tensor.dtype if keeps_dtype else np.dtype(dtype)

    def read(rows: slice, columns: slice) -> np.ndarray:
        return tensor.decode(rows)[:, columns].astype(read_dtype)

    return LazyMatrix(read_dtype, tensor.shape, read)


@dataclass(frozen=True, eq=False)
class PackedWeight(StoredWeight):
    """A weight in which each row has its own blocks: none extends over two rows.

    Weights are table values times scales. `codes` are `[N, K / 2]`, with the first code
    in the high bits, and `scales` `[N, K / B]`.
    """

    def codes_and_scales(self) -> tuple[SliceableTensor, SliceableTensor]:  # noqa: D102
        # The dtype of a QTensor's scales, which does not depend on their shape.
        dtype = self.packing.scheme.arrays((1, 1)).scales.dtype

        def read_scales(rows: slice, blocks: slice) -> np.ndarray:
            stored = np.asarray(self.scales[rows, blocks])
            scales = stored.astype(dtype)
            is_exact = scales.astype(np.float32) == stored.astype(np.float32)
            # E8M0 scales are exponents in bytes, in which 255 is NaN.
            is_finite = scales != 255 if dtype == np.uint8 else np.isfinite(scales)
            message = f"the scales of {self.name} must be finite and exact in "
            message += f"{scales.dtype.name}. Got {stored.dtype} values that are not."
            require(bool((is_exact & is_finite).all()), message)
            return scales

        return self.codes, LazyMatrix(dtype, self.scales.shape, read_scales)

    @np.errstate(invalid="ignore", over="ignore")  # callers reject non-finite weights
    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight in float32."""
        k, block_size = self.shape[1], self.packing.block_size
        packed = self.codes[rows, :]
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, k)
        scales = np.asarray(self.scales[rows, :])
        if self.packing.fmt == "mxfp4":  # E8M0: a byte e is the power 2**(e - 127)
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scales = scales.astype(np.float32)
        if self.scale_scales is not None:
            scales = scales * self.scale_scales[0] / self.scale_scales[1]
        return self.packing.format.table[codes] * np.repeat(scales, block_size, axis=1)


def packed_weight(
    fmt: str,
    dtype: str,
    codes: SliceableTensor,
    scales: SliceableTensor,
    scale_scales: np.ndarray | None = None,
) -> PackedWeight:
    """Returns a weight of a format; the shapes determine its block size."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    shape = tuple(scales.shape)
    num_blocks = shape[-1] if shape else 0
    is_matrix = len(shape) == 2 and shape[0] == n and num_blocks > 0
    message = f"scales must be [{n}, K / block size], where K is {k}. Got {shape}."
    require(is_matrix and k % num_blocks == 0, message)
    # A format that lists no block sizes allows all, and thus one block of K.
    block_sizes = get_format(fmt).block_sizes or (k,)
    if num_blocks == 1 and k not in block_sizes:
        # There is one scale per output, which is repeated for each block of the output.
        divisors = [size for size in block_sizes if k % size == 0]
        message = f"{k} inputs with one scale must be a multiple of one of "
        require(bool(divisors), f"{message}{block_sizes}.")
        num_blocks = k // divisors[0]
        scales = _repeat_column(scales, num_blocks)
    packing = Packing(fmt, k // num_blocks, False)
    arrays = codes, scales, scale_scales
    return PackedWeight((n, k), jnp.dtype(dtype), packing, *arrays)


def _repeat_column(column: SliceableTensor, count: int) -> LazyMatrix:
    """Returns a matrix `[N, count]` whose columns all equal `column` `[N, 1]`."""
    indices = np.zeros(count, int)
    return LazyMatrix(
        column.dtype,
        (column.shape[0], count),
        lambda rows, columns: np.asarray(column[rows, 0:1])[:, indices[columns]],
    )
