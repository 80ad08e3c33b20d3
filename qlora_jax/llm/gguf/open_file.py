"""Opens GGUF files."""

import functools
import pathlib
import struct
from typing import TYPE_CHECKING, Any

import qlora_jax as ql

if TYPE_CHECKING:
    from gguf import GGUFReader

# Exceptions that reading a damaged file may raise.
_READ_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_READ_ERRORS += (struct.error,)


def open_gguf(path: str | pathlib.Path) -> "GGUFReader":
    """Returns a `gguf.GGUFReader` of a complete file."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ql.io.CheckpointError(f"{path} must be a file.")
    stat = path.stat()
    return _open(path.absolute(), (stat.st_ino, stat.st_size, stat.st_mtime_ns))


# Cached, because commands open a file for the config, the tokenizer and the weights.
@functools.lru_cache(maxsize=1)
def _open(path: pathlib.Path, version: tuple[int, ...]) -> "GGUFReader":
    del version  # a part of the cache's key, so that a changed file is read again
    from .checked_reader import Reader  # imports `gguf`, which not every command needs

    try:
        reader = Reader(str(path))
    except _READ_ERRORS as error:
        raise ql.io.CheckpointError(
            f"{path} must be a whole GGUF file. {str(error) or repr(error):.200}"
        ) from error
    if reader.byte_order != "I":
        raise ql.io.CheckpointError(f"{path} must be a little-endian GGUF file.")
    return reader


def field(reader: "GGUFReader", key: str, default: Any = None) -> Any:
    """Returns the value of a field, or the default."""
    entry = reader.fields.get(key)
    return default if entry is None else entry.contents()
