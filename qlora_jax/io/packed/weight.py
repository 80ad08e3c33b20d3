"""A 4-bit weight as it is stored in the files of another library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ...quant.formats import Packing, get_format
from ..files import require
from ..tensors import TensorLike

# The format and the dtype of weights with integer codes (the first two arguments of
# `packed_weight`), by the dtype of the scales.
INTEGER_FORMATS = {
    "float16": ("int4_f16", "float16"),
    "bfloat16": ("int4_f16", "bfloat16"),
    "float32": ("int4", "float32"),
}
_ROWS_PER_CHECK = 4096  # bounds the memory for comparing scales and biases


class SliceableTensor(TensorLike, Protocol):
    """An array, or a tensor in a file that is read when it is indexed by slices."""

    def __getitem__(self, index: Any, /) -> Any: ...


Parts = Mapping[str, Any]  # the tensors of one weight, by the ends of their names


def packing_of(tensor: object) -> Packing | None:
    """Returns how a tensor is packed in its file, or None if it is not packed."""
    return getattr(tensor, "packing", None)


@dataclass(frozen=True, eq=False)
class View:
    """A matrix that is computed from a file, one slice at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[slice, slice], Any]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return np.asarray(self.read(*index))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:, :], dtype)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 4-bit weight `[N, K]`: table value times scale, or code times scale plus bias.

    Every weight can be decoded. A `QTensor` can hold its bytes if `problem` is None.
    """

    packing: Packing
    dtype: np.dtype  # of the decoded weight, unless `load` is given a dtype
    codes: SliceableTensor  # uint8[N, K / 2], first code in the high bits
    scales: SliceableTensor  # [N, K / B], in the dtype of the file
    scale_scales: np.ndarray | None = None  # nvfp4: a factor and a divisor
    biases: SliceableTensor | None = None  # [N, K / B]; None: decode with the table
    input_blocks: np.ndarray | None = None  # the block of each input; None: in order
    name: str = ""
    nbytes: int = 0  # of all of its tensors
    scale_offset = None
    keeps_dtype = False
    common_block = 1  # such a weight is never re-blocked, only moved or decoded

    @property
    def shape(self) -> tuple[int, int]:
        """The shape `[N, K]` of the decoded weight."""
        n, half_k = self.codes.shape
        return n, 2 * half_k

    @cached_property
    def problem(self) -> str | None:
        """Why a `QTensor` cannot hold its bytes; None if it can."""
        n, k = self.shape
        blocks = np.arange(k) // self.packing.block_size
        if self.input_blocks is not None and not (self.input_blocks == blocks).all():
            return "has reordered inputs (act order)"
        if self.biases is None:
            return None
        # The integer formats decode (code - 8) * scale, so a bias must be -8 * scale.
        for start in range(0, n, _ROWS_PER_CHECK):
            index = slice(start, start + _ROWS_PER_CHECK), slice(0, blocks[-1] + 1)
            scales = np.asarray(self.scales[index]).astype(np.float32)
            biases = np.asarray(self.biases[index]).astype(np.float32)
            if not np.array_equal(biases, -8 * scales, equal_nan=True):
                return "has zero points other than 8"
        return None

    def rows(self) -> tuple[SliceableTensor, SliceableTensor]:
        """Returns the codes `[N, K / 2]` and scales `[N, K / B]` of a `QTensor`."""
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

        return self.codes, View(self.scales.shape, dtype, read_scales)

    @np.errstate(invalid="ignore", over="ignore")  # callers reject non-finite weights
    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight in float32."""
        k, block_size = self.shape[1], self.packing.block_size
        packed = self.codes[rows, slice(0, k // 2)]
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, k)
        index = rows, slice(0, k // block_size)
        scales = np.asarray(self.scales[index])
        if self.packing.fmt == "mxfp4":  # E8M0: a byte e is the power 2**(e - 127)
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scales = scales.astype(np.float32)
        if self.scale_scales is not None:
            scales = scales * self.scale_scales[0] / self.scale_scales[1]
        # From [rows, K / B] to [rows, K], by the block of each input.
        in_order = self.input_blocks is None
        blocks = np.arange(k) // block_size if in_order else self.input_blocks
        if self.biases is None:
            return self.packing.format.table[codes] * scales[:, blocks]
        biases = np.asarray(self.biases[index]).astype(np.float32)
        return codes * scales[:, blocks] + biases[:, blocks]


def packed_weight(
    fmt: str,
    dtype: str,
    codes: SliceableTensor,
    scales: SliceableTensor,
    scale_scales: np.ndarray | None = None,
    biases: SliceableTensor | None = None,
    input_blocks: np.ndarray | None = None,
) -> PackedWeight:
    """Returns a weight of a format; the shapes determine its block size."""
    n, k = codes.shape[0], 2 * codes.shape[1]
    shape = tuple(scales.shape)
    num_blocks = shape[-1] if shape else 0
    is_matrix = len(shape) == 2 and shape[0] == n and num_blocks > 0
    message = f"scales must be [{n}, K / block size], where K is {k}. Got {shape}."
    require(is_matrix and k % num_blocks == 0, message)
    block_sizes = get_format(fmt).block_sizes or (k,)
    if num_blocks == 1 and k not in block_sizes:
        # There is one scale per output, which is repeated for each block of the output.
        divisors = [size for size in block_sizes if k % size == 0]
        message = (
            f"{k} inputs with one scale must be a multiple of one of {block_sizes}."
        )
        require(bool(divisors), message)
        num_blocks = k // divisors[0]
        scales = _repeat_column(scales, num_blocks)
        biases = None if biases is None else _repeat_column(biases, num_blocks)
        input_blocks = None  # all inputs have the same scale
    packing = Packing(fmt, k // num_blocks, False)
    arrays = codes, scales, scale_scales, biases, input_blocks
    return PackedWeight(packing, jnp.dtype(dtype), *arrays)


def _repeat_column(column: SliceableTensor, count: int) -> View:
    """Returns a matrix `[N, count]` whose columns all equal `column` `[N, 1]`."""
    indices = np.zeros(count, int)
    return View(
        (column.shape[0], count),
        column.dtype,
        lambda rows, columns: np.asarray(column[rows, 0:1])[:, indices[columns]],
    )


def transposed(x: SliceableTensor) -> View:
    """Returns the transpose of a matrix, which is read when it is sliced."""
    return View(tuple(x.shape[::-1]), x.dtype, lambda rows, columns: x[columns, rows].T)


def swap_nibbles(words: SliceableTensor) -> View:
    """Returns codes `[N, K / 2]` from words with the first code in the low bits."""
    size = np.dtype(words.dtype).itemsize

    def read(rows: slice, columns: slice) -> np.ndarray:
        first_word, last_word = columns.start // size, -(-columns.stop // size)
        stored = np.ascontiguousarray(words[rows, first_word:last_word])
        # Words are little-endian, so bytes are in order; only their halves are swapped.
        start = columns.start - first_word * size
        stored = stored.view(np.uint8)[:, start : start + columns.stop - columns.start]
        return stored >> 4 | stored << 4

    n, num_words = words.shape
    return View((n, num_words * size), np.dtype(np.uint8), read)


def unpack_words(
    words: np.ndarray, positions: list[int] | slice = slice(None)
) -> np.ndarray:
    """Returns the codes of int32 words, `[R, C]` to `[R, 8 * C]`.

    `positions` selects nibbles of each word, in order; 0 is the lowest nibble.
    """
    packed = np.ascontiguousarray(words).view(np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*words.shape, 8)
    return nibbles[..., positions].reshape(len(words), -1)


def zero_point_biases(
    zeros: SliceableTensor,
    scales: SliceableTensor,
    positions: list[int] | slice = slice(None),
    offset: int = 0,
) -> View:
    """Returns the bias `[N, K / B]` of each block: -scale * zero point.

    Zero points are words `[K / B, N / 8]`. `offset` is added to each word.
    """

    def read(rows: slice, columns: slice) -> np.ndarray:
        words = np.asarray(zeros[columns, :]).view(np.uint32) + np.uint32(offset)
        zero_points = unpack_words(words, positions)[:, rows].T
        return -zero_points.astype(np.float32) * np.asarray(scales[rows, columns])

    return View(scales.shape, np.dtype(np.float32), read)


def read_input_blocks(
    parts: Parts, name: str, k: int, num_blocks: int
) -> np.ndarray | None:
    """Returns the block of each input, or None if the file has no order of inputs."""
    if name not in parts:
        return None
    blocks = np.asarray(require_part(parts, name, "int32", axes=1)[...])
    if (blocks == -1).all():  # compressed-tensors' value for "not set"
        return None
    is_valid = blocks.shape == (k,) and blocks.min() >= 0 and blocks.max() < num_blocks
    require(is_valid, f"`{name}` must be {k} numbers from 0 to {num_blocks - 1}.")
    return blocks


def require_part(parts: Parts, name: str, dtypes: str, axes: int = 2) -> Any:
    """Returns a part of a weight; checks its dtype and its number of axes."""
    require(name in parts, f"`{name}` must be given. Got none.")
    x, choices = parts[name], dtypes.replace(" ", " or ")
    is_valid = str(x.dtype) in dtypes.split() and len(x.shape) == axes and all(x.shape)
    message = f"`{name}` must have dtype {choices} and {axes} axes. Got {x.dtype}"
    require(is_valid, f"{message}{list(x.shape)}.")
    return x


def check_4bit_words(name: str, words: SliceableTensor, count: int) -> None:
    """Raises CheckpointError if rows of `count` codes imply 1, 2, 3, 5, 6 or 8 bits."""
    bits = 8 * words.dtype.itemsize * words.shape[1] / count
    message = f"`{name}` must have codes of 4 bits. Got {bits:.0f} bits."
    # Any other number means that a shape is wrong, which the caller reports.
    require(bits not in (1, 2, 3, 5, 6, 8), message)


def read_scalar(parts: Parts, name: str) -> float:
    """Returns the value of a part that holds one positive number."""
    is_scalar = name in parts and tuple(parts[name].shape) in ((), (1,))
    require(is_scalar, f"`{name}` must be one number.")
    value = float(np.asarray(parts[name][...], np.float32).reshape(()))
    require(0 < value < np.inf, f"`{name}` must be positive and finite. Got {value}.")
    return value
