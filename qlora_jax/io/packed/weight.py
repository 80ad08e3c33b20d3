"""A 4-bit weight of a checkpoint, in any format.

To add a reader: in a file of this folder, write a function from the parts of a weight
(tensors by the ends of their names) and the folder's settings to a `PackedWeight`, and
a `Maker` of it. Name that in `readers.py`, and in `folder_settings.py` what the
config must say; refuse by `require`. Tests: the maker's bits in test_packed_readers.py,
which test_fuzz_io.py breaks. Loading, slices, packing again and refusals follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ...quant.formats import get_format
from ...quant.settings import Packing
from ..files import CheckpointError, require

# The format and the dtype of integers, by the dtype of their scales.
INT4 = {
    "float16": ("int4_f16", "float16"),
    "bfloat16": ("int4_f16", "bfloat16"),
    "float32": ("int4", "float32"),
}
_ROWS = 4096  # of which scales are compared at once


@dataclass(frozen=True)
class Maker:
    """The parts of a format's weights by name, and the function that reads them."""

    part: str  # a weight has it
    others: tuple[str, ...]  # it may have these
    # From the parts and the folder's settings to weights, by the ends of their names.
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
    dtype: str = ""  # of the part, where others' tensors have the same name
    separator: str = "."  # before the name of a part
    left_out: tuple[str, ...] = ()  # parts that are not for weights


@dataclass(frozen=True, eq=False)
class View:
    """A matrix that is made from a file, a slice at a time."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[slice, slice], Any]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return np.asarray(self.read(*index))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:, :], dtype)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 4-bit weight `[N, K]`: table value times scale, or code times scale plus bias.

    It can be moved, bytes for bytes, if `problem` is None, and decoded in any case.
    """

    packing: Packing
    dtype: np.dtype  # of weights, if no other is asked for
    codes: Any  # uint8[N, K / 2], the first in the high bits, as a `QTensor` has them
    scales: Any  # [N, K / B], in the dtype of the file
    scale_scales: Any = None  # a factor and a divisor, in nvfp4
    biases: Any = None  # of blocks, [N, K / B]; None for those of the table
    order: np.ndarray | None = None  # the block of each input; None: in order
    name: str = ""
    nbytes: int = 0  # of its parts
    scale_offset = None
    keeps_dtype = False
    common_block = 1  # what cannot be moved is decoded

    @property
    def shape(self) -> tuple[int, int]:
        """Its shape in the checkpoint, `[N, K]`."""
        n, half = self.codes.shape
        return n, 2 * half

    @cached_property
    def problem(self) -> str | None:
        """Why its bytes are not those of the format; None if they are."""
        n, k = self.shape
        blocks = np.arange(k) // self.packing.block_size
        if self.order is not None and not (self.order == blocks).all():
            return "has an order of its inputs (act order)"
        if self.biases is None:
            return None
        for start in range(0, n, _ROWS):
            part = slice(start, start + _ROWS), slice(0, blocks[-1] + 1)
            scales = np.asarray(self.scales[part]).astype(np.float32)
            biases = np.asarray(self.biases[part]).astype(np.float32)
            if not np.array_equal(biases, -8 * scales, equal_nan=True):
                return "has zero points other than 8"
        return None

    def rows(self) -> tuple[Any, Any]:
        """Returns codes `[N, K / 2]` and scales `[N, K / B]`; slices are read."""
        dtype = self.packing.scheme.arrays((1, 1)).scales.dtype
        return self.codes, View(self.scales.shape, dtype, self._scales)

    def _scales(self, *index: slice) -> np.ndarray:
        """Returns scales in the dtype of the format, which must hold them."""
        found = np.asarray(self.scales[index])
        scales = found.astype(self.packing.scheme.arrays((1, 1)).scales.dtype)
        is_same = scales.astype(np.float32) == found.astype(np.float32)
        is_number = scales != 255 if scales.dtype == np.uint8 else np.isfinite(scales)
        if not (is_same & is_number).all():
            raise CheckpointError(
                f"the scales of {self.name} must hold finite "
                f"{np.dtype(scales.dtype).name} numbers. Got others in {found.dtype}."
            )
        return scales

    @np.errstate(invalid="ignore", over="ignore")  # what is not finite is refused
    def decode(self, rows: slice) -> Float[np.ndarray, "n k"]:
        """Returns rows of the weight, in float32."""
        _, k = self.shape
        size = self.packing.block_size
        packed, blocks = self.codes[rows, slice(0, k // 2)], slice(0, k // size)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, k)
        scales = np.asarray(self.scales[rows, blocks])
        if self.packing.fmt == "mxfp4":
            scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        scales = scales.astype(np.float32)
        if self.scale_scales is not None:
            scales = scales * self.scale_scales[0] / self.scale_scales[1]
        block = np.arange(k) // size if self.order is None else self.order
        if self.biases is None:
            return self.packing.format.table[codes] * scales[:, block]
        biases = np.asarray(self.biases[rows, blocks]).astype(np.float32)
        return codes * scales[:, block] + biases[:, block]


def packed_weight(
    kind: tuple[str, str], codes: Any, scales: Any, **more: Any
) -> PackedWeight:
    """Returns a weight of a format and a dtype, whose scales must fit its codes."""
    (n, half), shape = codes.shape, tuple(scales.shape)
    blocks = shape[-1] if shape else 0
    message = f"scales must be [{n}, K / block size], K being {2 * half}. Got {shape}."
    is_whole = len(shape) == 2 and shape[0] == n and blocks > 0
    require(is_whole and 2 * half % blocks == 0, message)
    sizes = get_format(kind[0]).block_sizes or (2 * half,)
    if blocks == 1 and 2 * half not in sizes:
        # One scale for a channel is the same scale for each of its blocks.
        sizes = [size for size in sizes if 2 * half % size == 0]
        require(sizes, f"channels of {2 * half} inputs are not whole blocks.")
        blocks = 2 * half // sizes[0]
        more["order"] = None
        if more.get("biases") is not None:
            more["biases"] = _repeated(more["biases"], blocks)
        scales = _repeated(scales, blocks)
    packing = Packing(kind[0], 2 * half // blocks, False)
    return PackedWeight(packing, jnp.dtype(kind[1]), codes, scales, **more)


def _repeated(column: Any, count: int) -> View:
    """Returns a column `[N, 1]` so many times, `[N, count]`."""

    def read(rows: slice, columns: slice) -> np.ndarray:
        found = np.asarray(column[rows, 0:1])
        return np.repeat(found, len(range(count)[columns]), axis=1)

    return View((column.shape[0], count), column.dtype, read)


def transposed(x: Any) -> View:
    """Returns a matrix of a file, transposed."""
    return View(tuple(x.shape[::-1]), x.dtype, lambda rows, columns: x[columns, rows].T)


def low_first(words: Any) -> View:
    """Returns the codes of words in rows, the first code in the lowest bits."""
    size = np.dtype(words.dtype).itemsize

    def read(rows: slice, columns: slice) -> np.ndarray:
        first = columns.start // size
        found = np.asarray(words[rows, first : -(-columns.stop // size)])
        found = np.ascontiguousarray(found).view(np.uint8)
        skipped = columns.start - first * size
        found = found[:, skipped : skipped + columns.stop - columns.start]
        return found >> 4 | found << 4

    n, count = words.shape
    return View((n, count * size), np.dtype(np.uint8), read)


def nibbles(words: np.ndarray, places: Any = slice(None)) -> np.ndarray:
    """Returns what words `[R, C]` hold, `[R, 8 * C]`, in the order of their places."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    found = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*words.shape, 8)
    return found[..., places].reshape(len(words), -1)


def zero_biases(
    zeros: Any, scales: Any, places: Any = slice(None), add: int = 0
) -> View:
    """Returns a bias for each block: its zero times the scale, negative.

    Zeros are words `[K / B, N / 8]`, in an order of outputs, less `add`.
    """

    def read(rows: slice, columns: slice) -> np.ndarray:
        words = np.asarray(zeros[columns, :]).view(np.uint32) + np.uint32(add)
        found = nibbles(words, places)[:, rows].T
        return -found.astype(np.float32) * np.asarray(scales[rows, columns])

    return View(scales.shape, np.dtype(np.float32), read)


def order_of(
    parts: Mapping[str, Any], name: str, k: int, blocks: int
) -> np.ndarray | None:
    """Returns the block of each input, if a part says it; -1 is for none."""
    if name not in parts:
        return None
    found = np.asarray(part(parts, name, "int32", axes=1)[...])
    if (found == -1).all():
        return None
    is_block = found.shape == (k,) and found.min() >= 0 and found.max() < blocks
    require(is_block, f"`{name}` must be {k} numbers from 0 to {blocks - 1}.")
    return found


def part(parts: Mapping[str, Any], name: str, dtypes: str, axes: int = 2) -> Any:
    """Returns a part of a weight, which must be there, of a dtype and with axes."""
    require(name in parts, f"`{name}` must be given. Got none.")
    x = parts[name]
    require(
        str(x.dtype) in dtypes.split() and len(x.shape) == axes and all(x.shape),
        f"`{name}` must be of {dtypes.replace(' ', ' or ')}, with {axes} axes. Got "
        f"{x.dtype}{list(x.shape)}.",
    )
    return x


def check_bits(name: str, words: Any, count: int) -> None:
    """Refuses rows of words that hold so many codes of other than 4 bits."""
    bits = 8 * words.dtype.itemsize * words.shape[1] / count
    is_other = bits in (1, 2, 3, 5, 6, 8)
    require(not is_other, f"`{name}` must have codes of 4 bits. Got {bits:.0f} bits.")


def one_number(parts: Mapping[str, Any], name: str) -> float:
    """Returns a part that is one positive number."""
    is_one = name in parts and tuple(parts[name].shape) in ((), (1,))
    require(is_one, f"`{name}` must be one number.")
    found = float(np.asarray(parts[name][...], np.float32).reshape(()))
    message = f"`{name}` must be positive and finite. Got {found}."
    require(0 < found < np.inf, message)
    return found
