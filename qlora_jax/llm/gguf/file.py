"""Reads the header of a GGUF file, and checks every size in it."""

import functools
import math
import pathlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import qlora_jax as ql

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

# Exceptions that reading a damaged file may raise.
_READ_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_READ_ERRORS += (struct.error,)
# GGUF identifies the types of values by numbers. `_NUMBERS` has the codes that `struct`
# and NumPy use for the numeric types.
_STRING, _ARRAY = 8, 9
_NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
# For each type of tensor that is not stored in blocks, its dtype in NumPy.
_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
_DTYPES |= {f"I{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)}
_SIZE = struct.Struct("<Q")
_TRUNCATED = "The file ends too early."


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a GGUF file.

    If its type stores blocks, `data` has bytes instead of values on the last axis.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: "GGMLQuantizationType"
    data: Any  # an array; in `decoder_in`, also a list of one `_Alternating` per expert
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """The values of a GGUF file's keys, and its tensors, which are not read yet."""

    path: pathlib.Path
    values: dict[str, Any]
    # For each key, the number of its type; for arrays, also the type of the items.
    types: dict[str, tuple[int, ...]]
    tensors: dict[str, StoredTensor]


def is_gguf(path: pathlib.Path) -> bool:
    """Whether the name of a path ends in `.gguf`."""
    return path.suffix == ".gguf"


def open_gguf(path: str | pathlib.Path) -> GGUFFile:
    """Opens a GGUF file; raises a CheckpointError if it is incomplete or damaged."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ql.io.CheckpointError(f"{path} must be a file.")
    stat = path.stat()
    return _open(path.absolute(), (stat.st_ino, stat.st_size, stat.st_mtime_ns))


# Cached, because commands open a file for the config, the tokenizer and the weights.
@functools.lru_cache(maxsize=1)
def _open(path: pathlib.Path, version: tuple[int, ...]) -> GGUFFile:
    del version  # a part of the cache's key, so that a changed file is read again
    try:
        return _read(path)
    except _READ_ERRORS as error:
        raise ql.io.CheckpointError(
            f"{path} must be a whole GGUF file. {str(error) or repr(error):.200}"
        ) from error


class _Cursor:
    """A position in a file. Reads move it forward, or raise at the end of the file.

    A corrupt count therefore cannot make a loop of reads go on forever.
    """

    def __init__(self, data: memoryview):
        self.bytes, self.offset = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.bytes, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        (size,) = _SIZE.unpack_from(self.bytes, self.offset)
        start = self.offset + _SIZE.size
        data = self.bytes[start : start + size]
        if len(data) != size:
            raise ValueError(_TRUNCATED)
        self.offset = start + size
        return str(data, "utf-8")

    def value(self) -> tuple[Any, tuple[int, ...]]:
        """Returns a value and the numbers of its types, as in `GGUFFile.types`."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text(), (kind,)
        if kind != _ARRAY:
            return self.number(_number_code(kind)), (kind,)
        item_kind, count = self.number("I"), self.number("Q")
        if item_kind == _STRING:
            return [self.text() for _ in range(count)], (kind, item_kind)
        dtype = np.dtype(f"<{_number_code(item_kind)}")
        if count * dtype.itemsize > len(self.bytes) - self.offset:
            raise ValueError(_TRUNCATED)
        items = np.frombuffer(self.bytes, dtype, count, self.offset).tolist()
        self.offset += count * dtype.itemsize
        return items, (kind, item_kind)


def _number_code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(
            "Its metadata values must be numbers, strings, or arrays of numbers or "
            f"strings. Got a value of GGUF's type {kind}."
        )
    return _NUMBERS[kind]


def _read(path: pathlib.Path) -> GGUFFile:
    # Slicing a plain array takes less time than slicing a `memmap` object.
    data = np.asarray(np.memmap(path, mode="r"))
    cursor = _Cursor(data.data)
    magic, version = cursor.number("4s"), cursor.number("I")
    if magic != b"GGUF":
        raise ValueError("It does not begin with GGUF.")
    if version & 0xFFFF == 0:  # a small number whose bytes are in the other order
        raise ValueError("It must be little-endian.")
    if version not in (2, 3):
        raise ValueError(f"Its version must be 2 or 3. Got {version}.")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    values, types = {}, {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in values:
            raise ValueError(f"It has the key {key!r:.80} twice.")
        values[key], types[key] = cursor.value()
    infos = [_read_info(cursor) for _ in range(num_tensors)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(
            f"`general.alignment` must be a positive integer. Got {alignment!r:.80}."
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, shape, tensor_type, nbytes, offset in infos:
        if name in tensors:
            raise ValueError(f"It has the tensor {name!r:.80} twice.")
        if offset % alignment or start + offset + nbytes > len(data):
            raise ValueError("A tensor lies outside the file, or is misaligned.")
        stored = data[start + offset : start + offset + nbytes]
        if dtype := _DTYPES.get(tensor_type.name):
            stored = stored.view(dtype)
        stored = stored.reshape(*shape[:-1], -1)
        tensors[name] = StoredTensor(name, shape, tensor_type, stored, nbytes)
    return GGUFFile(path, values, types, tensors)


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], Any, int, int]:
    """Returns a tensor's name, shape, type, size in bytes and offset."""
    import gguf  # takes long to import, and not every command needs it

    name, num_axes = cursor.text(), cursor.number("I")
    if not 1 <= num_axes <= 4:
        raise ValueError(f"A tensor must have 1 to 4 axes. Got {num_axes}.")
    # GGUF lists the axes in reverse: the last axis of the array comes first.
    shape = tuple([cursor.number("Q") for _ in range(num_axes)][::-1])
    tensor_type = gguf.GGMLQuantizationType(cursor.number("I"))
    if num_axes == 1 and tensor_type.name not in _DTYPES:  # llama.cpp writes F32
        raise ValueError(
            f"A tensor with one axis must be {', '.join(_DTYPES)}. Got {name!r:.80}, "
            f"which is {tensor_type.name}."
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    count = math.prod(shape)
    if not count or shape[-1] % block:
        raise ValueError(f"Tensor shape {shape} is invalid for blocks of {block}.")
    return name, shape, tensor_type, count // block * block_bytes, cursor.number("Q")
