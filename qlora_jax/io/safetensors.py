"""Reads safetensors files lazily and strictly, and writes them as a stream.

A file consists of the header's length (8 bytes), the header (JSON with the dtype, the
shape and the byte offsets of each tensor) and the tensors' bytes without gaps.

The `safetensors` package (0.8) checks headers, but does not read tensors. It would need
far more memory to read a large file in pieces (the section "Files" of
docs/development/design.md has measurements), and cannot return float8 as NumPy arrays.
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from .files import (
    CheckpointError,
    Path,
    member,
    new_path,
    parse_json,
    read_json,
    require,
)
from .tensors import File, LazyTensor, TensorLike, Tensors

INDEX = "model.safetensors.index.json"
# The dtypes that NumPy and ml_dtypes have. The 4-bit and 6-bit dtypes of newer files
# are rejected.
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
# The codes of NumPy's dtypes. The keys are little-endian, like the values in a file.
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def open_safetensors(path: Path) -> Tensors:
    """Returns the tensors of a `.safetensors` file or folder; reads only the headers.

    Args:
        path: A file; or a folder with `model.safetensors.index.json` and the files that
            it names, or with `model.safetensors`, or with `.safetensors` files that
            hold different tensors.

    Raises:
        CheckpointError: If there is no such file, a header is broken or too large, or
            an index does not list the tensors of its files.

    Example:
        >>> import tempfile, numpy as np, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> ql.io.write_safetensors(path, {"a": np.ones((2, 3)), "b": np.zeros(1)})
        >>> tensors = ql.io.open_safetensors(path)
        >>> sorted((name, x.shape) for name, x in tensors.items())
        [('a', (2, 3)), ('b', (1,))]
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        # A device such as /dev/zero is rejected, because reading it would never end.
        require(path.is_file(), f"{path} must be a file or a folder.")
        return _open_file(path)
    # A dangling link is also an index that must not be ignored: `member` rejects it.
    if (path / INDEX).exists() or (path / INDEX).is_symlink():
        return _open_indexed(path)
    file_names = ["model.safetensors"]
    if not (path / file_names[0]).exists():
        file_names = sorted(file.name for file in path.glob("*.safetensors"))
    require(bool(file_names), f"{path} must hold .safetensors files.")
    return _union(path, {name: _open_file(member(path, name)) for name in file_names})


def _union(folder: pathlib.Path, files: Mapping[str, Tensors]) -> Tensors:
    union: dict[str, LazyTensor] = {}
    for tensors in files.values():
        duplicates = sorted(union.keys() & tensors.keys())[:5]
        message = f"the files of {folder} have duplicate tensors: {duplicates}."
        require(not duplicates, message)
        union |= tensors
    # An index may list no files at all.
    first = next(iter(files.values()), None)
    return Tensors(union, {} if first is None else first.metadata, folder)


def _open_indexed(folder: pathlib.Path) -> Tensors:
    weight_map: Any = read_json(member(folder, INDEX)).get("weight_map")
    require(
        isinstance(weight_map, dict)
        and all(isinstance(file, str) for file in weight_map.values())
        and all(file.endswith(".safetensors") for file in weight_map.values()),
        f"{folder / INDEX} must have a `weight_map` to .safetensors files.",
    )
    file_names = sorted({*weight_map.values()})
    files = {name: _open_file(member(folder, name)) for name in file_names}
    tensors = _union(folder, files)
    missing = sorted(n for n, file in weight_map.items() if n not in files[file])
    unlisted = sorted(tensors.keys() - weight_map.keys())
    require(
        not missing and not unlisted,
        f"{folder / INDEX} must list the tensors of its files. Missing from the "
        f"files: {missing[:5]}. Missing from the index: {unlisted[:5]}.",
    )
    return tensors


def _open_file(path: pathlib.Path) -> Tensors:
    # The package checks the header: tensors must fill the file, without gaps. Its own
    # errors do not say which file is wrong.
    try:
        with safetensors.safe_open(path, "numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error
    file = File(path)
    prefix = bytearray(8)  # the length of the header, little-endian
    file.read_into(memoryview(prefix), 0)
    header = bytearray(int.from_bytes(prefix, "little"))
    file.read_into(memoryview(header), 8)
    entries = parse_json(bytes(header), f"the header of {path}")
    metadata = entries.pop("__metadata__", None) or {}  # null in files of MLX
    codes = {entry["dtype"] for entry in entries.values()}
    message = f"the dtypes of {path} must be among {', '.join(_DTYPES)}. Got "
    require(codes <= {*_DTYPES}, f"{message}{sorted(codes - {*_DTYPES})}.")
    tensors = {
        name: LazyTensor(
            _DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            file,
            8 + len(header) + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
    return Tensors(tensors, metadata)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorLike],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file atomically, a tensor at a time.

    Args:
        path: The file.
        tensors: The tensors by name: NumPy or JAX arrays, or other objects with a dtype
            and a shape that `numpy.asarray` converts. Each is converted once.
        metadata: Strings to store in the header.

    Raises:
        TypeError: If safetensors does not support a dtype, or if names or metadata are
            not strings.
        ValueError: If a tensor is called `__metadata__`, which is the format's name for
            the metadata.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.write_safetensors(path, {"x": jnp.ones((2, 2), jnp.bfloat16)})
        >>> ql.io.open_safetensors(path)["x"].nbytes
        8
    """
    header, order = make_header(tensors, metadata)
    with new_path(path) as new, new.open("wb") as file:
        file.write(header)
        write_tensors(file.write, tensors, order)


def make_header(
    tensors: Mapping[str, TensorLike], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """Returns the bytes before the tensors, and the order of the tensors."""
    if "__metadata__" in tensors:
        raise ValueError("a tensor must not be called `__metadata__`.")
    # JSON would silently turn keys of other types into strings.
    if wrong_names := [name for name in tensors if not isinstance(name, str)]:
        raise TypeError(f"names of tensors must be strings. Got {wrong_names}.")
    wrong_metadata = {
        key: value
        for key, value in (metadata or {}).items()
        if not (isinstance(key, str) and isinstance(value, str))
    }
    if wrong_metadata:
        raise TypeError(
            f"`metadata` must map strings to strings. Got {wrong_metadata}."
        )
    dtypes = {name: _stored_dtype(name, x) for name, x in tensors.items()}
    # Wide values come first, so that each tensor is aligned to the size of its values.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0  # of the last tensor, counted from the end of the header
    for name in order:
        shape, start = [*map(int, tensors[name].shape)], end
        end += math.prod(shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _CODES[dtypes[name]],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    return len(text).to_bytes(8, "little") + text, order


def write_tensors(
    write: Callable[[memoryview], object],
    tensors: Mapping[str, TensorLike],
    order: Sequence[str],
) -> None:
    """Writes the bytes of the tensors in the order that `make_header` returned."""
    for name in order:
        tensor = tensors[name]
        x = np.asarray(tensor)
        # The header is already written, so another shape or dtype would break the file.
        if (x.shape, x.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise ValueError(
                f"{name} must have shape {tensor.shape}, dtype {tensor.dtype}. "
                f"Got {x.shape}, {x.dtype}."
            )
        # Big-endian values are converted to little-endian ones here.
        x = np.ascontiguousarray(x, _stored_dtype(name, x))
        write(x.reshape(-1).view(np.uint8).data)


def _stored_dtype(name: str, x: TensorLike) -> np.dtype:
    try:
        dtype = np.dtype(x.dtype).newbyteorder("<")
    except TypeError:  # the dtype of JAX's keys of random numbers is not NumPy's
        dtype = x.dtype
    if dtype not in _CODES:
        raise TypeError(
            f"{name} must have one of the dtypes {', '.join(map(str, _CODES))}. Got "
            f"{dtype}."
        )
    return dtype
