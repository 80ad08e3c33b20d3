"""Opens GGUF files."""

import functools
import pathlib
import struct
from typing import Any

import qlora_jax as ql

# Errors of reading a damaged file.
_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_FAULTS += (struct.error,)


def open_gguf(path: str | pathlib.Path) -> Any:
    """Returns a `gguf.GGUFReader` of a complete file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ql.io.CheckpointError(f"{path} must be a file.")
    stat = path.stat()
    return _open(path.absolute(), (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=1)  # a command reads config, tokenizer and weights
def _open(path: pathlib.Path, version: Any) -> Any:
    del version  # another one is another file
    from .checked_reader import Reader  # imports `gguf`, which not every command needs

    try:
        reader = Reader(str(path))
    except _FAULTS as error:
        raise ql.io.CheckpointError(
            f"{path} must be a whole GGUF file. {str(error) or repr(error):.200}"
        ) from error
    if reader.byte_order != "I":
        raise ql.io.CheckpointError(f"{path} must be a little-endian GGUF file.")
    return reader


def field(reader: Any, key: str, default: Any = None) -> Any:
    """Returns the value of a field, or the default."""
    found = reader.fields.get(key)
    return default if found is None else found.contents()
