"""Reads safetensors files lazily and strictly, and writes them as a stream.

A file is the header's length (8 bytes), the header (JSON: dtype, shape, place of each
tensor) and the tensors' bytes without gaps. Slices are read, not memory-mapped, so a
process holds only what it asked for.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..files import CheckpointError, Path, member, new_path, read_json
from ..tensors import File, LazyTensor, Tensors
from .header import MAX_HEADER_BYTES, make_header, parse_header, stored_dtype

INDEX = "model.safetensors.index.json"


def open_safetensors(path: Path) -> Tensors:
    """Returns the tensors of a `.safetensors` file or folder; reads only the headers.

    Args:
        path: A file; or a folder with `model.safetensors.index.json` and the files that
            it names, or with `model.safetensors`, or with `.safetensors` files that
            hold different tensors.

    Raises:
        CheckpointError: If there is none; if a header is broken or too large; or if an
            index does not list the tensors of its files.

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
        if not path.is_file():
            raise CheckpointError(f"{path} must be a file or a folder.")
        return _open_file(path)
    if (path / INDEX).exists() or (path / INDEX).is_symlink():
        return _open_indexed(path)
    names = ["model.safetensors"]
    if not (path / names[0]).exists():
        names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{path} must hold .safetensors files.")
    return _union(path, {name: _open_file(member(path, name)) for name in names})


def _union(folder: pathlib.Path, files: Mapping[str, Tensors]) -> Tensors:
    found: dict[str, LazyTensor] = {}
    for tensors in files.values():
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"files of {folder} have tensors twice: {twice[:5]}.")
        found |= tensors
    first = next(iter(files.values()), None)
    return Tensors(found, first.metadata if first else {}, folder)


def _open_indexed(folder: pathlib.Path) -> Tensors:
    where = read_json(member(folder, INDEX)).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(file, str) and file.endswith(".safetensors")
        for file in where.values()
    ):
        raise CheckpointError(
            f"{folder / INDEX} must have a `weight_map` to .safetensors files."
        )
    files = {
        name: _open_file(member(folder, name)) for name in sorted({*where.values()})
    }
    tensors = _union(folder, files)
    missing = sorted(n for n, file in where.items() if n not in files[file])
    extra = sorted(tensors.keys() - where.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder / INDEX} must list the tensors of its files. Not there: "
            f"{missing[:5]}. Not listed: {extra[:5]}."
        )
    return tensors


def _open_file(path: pathlib.Path) -> Tensors:
    file = File(path)
    prefix = bytearray(8)
    if file.size < 8:
        raise CheckpointError(f"{path} is too short for a safetensors file.")
    file.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(
            f"{path} must have a header of 2 to {MAX_HEADER_BYTES} bytes within the "
            f"file. Got {length} of {file.size} bytes."
        )
    header = bytearray(length)
    file.read_into(memoryview(header), 8)
    end = 8 + length
    places, metadata = parse_header(bytes(header), file.size - end, str(path))
    tensors = {
        name: LazyTensor(place.dtype, place.shape, file, end + place.start)
        for name, place in places.items()
    }
    return Tensors(tensors, metadata)


def write_safetensors(
    path: Path, tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file atomically, a tensor at a time.

    Args:
        path: The file.
        tensors: By name: NumPy or JAX arrays, or other objects with a dtype and a shape
            that `numpy.asarray` takes; each is converted once.
        metadata: Text for the header.

    Raises:
        TypeError: If safetensors has no such dtype.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.write_safetensors(path, {"x": jnp.ones((2, 2), jnp.bfloat16)})
        >>> ql.io.open_safetensors(path)["x"].nbytes
        8
    """
    start, order = make_header(tensors, metadata)
    with new_path(path) as new, new.open("wb") as file:
        file.write(start)
        write_tensors(file.write, tensors, order)


def write_tensors(
    write: Callable[[Any], Any], tensors: Mapping[str, Any], order: Sequence[str]
) -> None:
    """Writes the bytes of tensors in the order of a header."""
    for name in order:
        planned = tensors[name]
        x = np.asarray(planned)
        if (x.shape, x.dtype) != (tuple(planned.shape), planned.dtype):
            raise ValueError(
                f"{name} must have shape {planned.shape}, dtype {planned.dtype}. "
                f"Got {x.shape}, {x.dtype}."
            )
        x = np.ascontiguousarray(x, stored_dtype(x))
        write(x.reshape(-1).view(np.uint8).data)
