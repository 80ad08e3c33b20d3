"""Reads and writes the header of a safetensors file."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..files import parse_json, require

MAX_HEADER_BYTES = 16 << 20
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
    """A tensor's entry in a header; its bytes are from `start` to `stop`."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(
    header: bytes, size: int, what: str
) -> tuple[dict[str, Extent], dict[str, str]]:
    """Returns each tensor's place and the metadata; tensors must fill `size` bytes."""
    require(header[:1] == b"{", f"the header of {what} must be a JSON object.")
    found = parse_json(header, f"the header of {what}")
    metadata = found.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null
    is_text = lambda value: isinstance(value, str)
    require(
        isinstance(metadata, dict) and all(map(is_text, metadata.values())),
        f"`__metadata__` of {what} must map text to text.",
    )
    places = {name: _place(f"{name!r} of {what}", x) for name, x in found.items()}
    _check_no_gaps(what, places, size)
    return places, metadata


def _place(tensor: str, entry: Any) -> Extent:
    is_size = lambda n: type(n) is int and 0 <= n < 1 << 63
    keys = {"dtype", "shape", "data_offsets"}
    is_entry = isinstance(entry, dict) and entry.keys() == keys
    require(is_entry, f"{tensor} must have {sorted(keys)}.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"the dtype of {tensor} must be one of {', '.join(_DTYPES)}. Got "
        f"{str(dtype)[:20]!r}.",
    )
    is_sizes = lambda x: isinstance(x, list) and len(x) <= 16 and all(map(is_size, x))
    require(is_sizes(shape), f"the shape of {tensor} must be sizes.")
    require(is_sizes(offsets), f"the offsets of {tensor} must be two sizes.")
    # NumPy refuses long axes even next to an empty one.
    is_small = math.prod(max(n, 1) for n in shape) < 1 << 60
    require(is_small, f"the shape of {tensor} must be smaller.")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    require(
        len(offsets) == 2 and offsets[1] - offsets[0] == size,
        f"the offsets of {tensor} must be {size} bytes apart. Got {offsets[:3]}.",
    )
    return Extent(_DTYPES[dtype], tuple(shape), *offsets)


def _check_no_gaps(what: str, places: Mapping[str, Extent], size: int) -> None:
    end = 0
    # Gaps could hide data, and overlaps let a small file claim large tensors.
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        require(
            place.start == end,
            f"{name!r} of {what} must begin where the tensor before it ends, at "
            f"{end}. Got {place.start}.",
        )
        end = place.stop
    require(
        end == size,
        f"the tensors of {what} must be the {size} bytes behind its header. Got "
        f"{end} bytes.",
    )


def stored_dtype(x: Any) -> np.dtype:
    """Returns the dtype that an array has in a file."""
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
    """Returns the bytes before the tensors, and the order of the tensors."""
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
