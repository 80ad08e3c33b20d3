"""Reads and writes the header of a safetensors file."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..files import CheckpointError, parse_json

MAX_HEADER_BYTES = 16 << 20
_LONGEST_NAME = 500
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Extent(NamedTuple):
    """What a header says of a tensor; its bytes are those from `start` to `stop`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(
    header: bytes, size: int, what: str
) -> tuple[dict[str, Extent], dict[str, str]]:
    """Returns where each tensor is, and the metadata.

    Args:
        header: The JSON.
        size: Bytes of the file behind it.
        what: The name of the file, for errors.

    Raises:
        CheckpointError: If it says anything but where tensors are that together make up
            the file.
    """
    if not header.startswith(b"{"):
        raise CheckpointError(f"the header of {what} must be a JSON object.")
    found = parse_json(header, f"the header of {what}")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"`__metadata__` of {what} must map text to text.")
    if long := [name for name in found if len(name) > _LONGEST_NAME]:
        raise CheckpointError(
            f"tensors of {what} must have names of {_LONGEST_NAME} letters at most. "
            f"Got {long[0][:80]!r}..."
        )
    places = {name: _place(f"{name!r} of {what}", x) for name, x in found.items()}
    _check_no_gaps(what, places, size)
    return places, metadata


def _place(tensor: str, entry: Any) -> Extent:
    is_size = lambda n: type(n) is int and 0 <= n < 1 << 63
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise CheckpointError(f"{tensor} must have {sorted(keys)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"the dtype of {tensor} must be one of {', '.join(_DTYPES)}. Got "
            f"{str(dtype)[:20]!r}."
        )
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(is_size, shape)):
        raise CheckpointError(f"the shape of {tensor} must be sizes.")
    if not isinstance(offsets, list) or not all(map(is_size, offsets)):
        raise CheckpointError(f"the offsets of {tensor} must be two sizes.")
    # NumPy refuses axes that are too long beside an empty one.
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise CheckpointError(f"the shape of {tensor} must be smaller.")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise CheckpointError(
            f"the offsets of {tensor} must be {size} bytes apart. Got {offsets[:3]}."
        )
    return Extent(_DTYPES[dtype], tuple(shape), *offsets)


def _check_no_gaps(what: str, places: Mapping[str, Extent], size: int) -> None:
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.start != end:
            raise CheckpointError(
                f"{name!r} of {what} must begin where the tensor before it ends, at "
                f"{end}. Got {place.start}."
            )
        end = place.stop
    if end != size:
        raise CheckpointError(
            f"the tensors of {what} must be the {size} bytes behind its header. Got "
            f"{end} bytes."
        )


def stored_dtype(x: Any) -> np.dtype:
    """Returns the dtype that an array has in a file.

    Raises:
        TypeError: If safetensors has none for it.
    """
    dtype = np.dtype(x.dtype).newbyteorder("<")
    if dtype not in _CODES:
        raise TypeError(
            f"a tensor must have one of the dtypes {', '.join(map(str, _CODES))}. Got "
            f"{dtype}."
        )
    return dtype


def make_header(
    tensors: Mapping[str, Any], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """Returns the start of a file up to its tensors' bytes, and the tensors' order."""
    dtypes = {name: stored_dtype(x) for name, x in tensors.items()}
    # Wide values first, so that each tensor is aligned.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        shape, start = [*map(int, tensors[name].shape)], end
        end += math.prod(shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _CODES[dtypes[name]],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order
