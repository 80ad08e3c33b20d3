"""Reads files of rows; the suffix of a file chooses its reader."""

import contextlib
import csv
import gzip
import importlib
import itertools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import qlora_jax as ql

MAX_BYTES = 64 << 20  # of a line, and of a text
_BOM = b"\xef\xbb\xbf"
_DAMAGE = (ValueError, OSError, EOFError, zlib.error)  # what a wrong file raises
Rows = Iterator[tuple[int, Any]]  # a value or an error for each number


class FileName(NamedTuple):
    """The parts of a file's name."""

    stem: str
    suffix: str  # without ".gz", such as ".jsonl"
    zipped: bool  # ".gz" follows


def split_name(path: pathlib.Path) -> FileName | None:
    """Returns the parts of a file's name; None if no reader takes it."""
    zipped = path.name.lower().endswith(".gz")
    stem, suffix = os.path.splitext(path.name[:-3] if zipped else path.name)
    found = FileName(stem, suffix.lower(), zipped)
    is_known = found.suffix in READERS and not (zipped and found.suffix == ".parquet")
    return found if is_known else None


def open_rows(path: pathlib.Path, name: FileName) -> tuple[str, Rows]:
    """Returns the unit of its numbers, "line" from 1 or "row" from 0, and the rows."""
    unit, reader = READERS[name.suffix]
    if name.suffix == ".json" and _has_lines(path, name.zipped):
        unit, reader = READERS[".jsonl"]
    return unit, rows_of(path, name, reader)


def _open(path: pathlib.Path, zipped: bool) -> Any:
    return gzip.open(path) if zipped else path.open("rb")


def _has_lines(path: pathlib.Path, zipped: bool) -> bool:
    """Whether each line is a row: the first one that is not blank is an object."""
    with _open(path, zipped) as file, contextlib.suppress(*_DAMAGE):
        lines = iter(lambda: file.readline(MAX_BYTES).removeprefix(_BOM), b"")
        first = next(filter(bytes.strip, lines), b"")
        return isinstance(ql.io.parse_json(first, "it"), dict)
    return False


def describe_path(path: str | pathlib.Path) -> str:
    """Returns a path for an error, which says so if nothing is there."""
    return f"{str(path)!r}{'' if pathlib.Path(path).exists() else ', which is missing'}"


def rows_of(
    path: pathlib.Path, name: FileName, reader: Callable[[BinaryIO], Rows]
) -> Rows:
    """Yields the rows of a file, which may not change meanwhile."""
    empty = True
    with _open(path, name.zipped) as file:
        before = file_stamp(file.fileno())
        try:
            for row in reader(file):
                empty = False
                yield row
        except _DAMAGE as error:
            if getattr(error, "errno", None):  # of the system, such as a full disk
                raise
            kind = name.suffix + ".gz" * name.zipped
            raise ValueError(f"{path} must be a {kind} file. {error}") from error
        after = file_stamp(file.fileno())
    if not before == after == (path.exists() and file_stamp(path)):
        raise ValueError(f"{path} must not change while it is read. It did.")
    if empty:
        raise ValueError(f"{path} must have rows. Got none.")


def file_stamp(file: pathlib.Path | int) -> tuple[int, ...]:
    """Returns what changes with a file, which is a path or a number of an open one."""
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def jsonl(file: BinaryIO) -> Rows:
    """Yields the rows of lines."""
    lines = iter(lambda: file.readline(MAX_BYTES + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_BYTES:
            yield number, ValueError(f"it must have at most {MAX_BYTES} bytes.")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_BYTES)
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            try:
                yield number, _object(ql.io.parse_json(line, "it"))
            except ValueError as error:
                yield number, error


def _json(file: BinaryIO) -> Rows:
    rows = ql.io.parse_json(file.read().removeprefix(_BOM), "It")
    if isinstance(rows, dict):
        raise ValueError(
            "It must be a list of rows, or have a row in each line. Got an object with "
            f"{[*rows]!s:.200}."
        )
    yield from enumerate(map(_object, rows))


def _object(found: Any) -> Any:
    if not isinstance(found, dict):
        return ValueError(f"it must be a JSON object. Got {found!r:.40}.")
    return found


def _csv(file: BinaryIO) -> Rows:
    """Yields rows of texts; the first line has the names."""
    reader = csv.reader(_decoded(file), strict=True)
    names = _next(reader) or []
    if len({*names}) < len(names):
        raise ValueError(f"its columns must have different names. Got {names}.")
    while True:
        number, row = reader.line_num + 1, _next(reader)
        if row is None:
            return
        if row and len(row) != len(names):
            wanted = f"{len(names)} fields, as the header"
            yield number, ValueError(f"it must have {wanted}. Got {len(row)}.")
        elif row:
            yield number, dict(zip(names, row, strict=True))


def _decoded(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"Line {number}: {error}.") from error


def _next(reader: Any) -> list[str] | None:
    before = csv.field_size_limit(MAX_BYTES)  # one for all readers of a process
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: BinaryIO) -> Rows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "Parquet files need: pip install 'qlora-jax[parquet]'"
        ) from error
    batches = parquet.ParquetFile(file).iter_batches(1024)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    yield from enumerate(map(without_none, rows))


def without_none(value: Any) -> Any:
    """Drops the None that Arrow fills in where a row has no such key."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value


def _text(file: BinaryIO) -> Rows:
    data = file.read(MAX_BYTES + 1).removeprefix(_BOM)
    if len(data) > MAX_BYTES:
        raise ValueError(f"It must have at most {MAX_BYTES} bytes.")
    if text := data.decode("utf-8"):
        yield 1, {"text": text}


# The unit of row numbers, and the reader. All but Parquet may be compressed.
READERS: dict[str, tuple[str, Callable[[BinaryIO], Rows]]] = {
    ".jsonl": ("line", jsonl),
    ".json": ("row", _json),
    ".csv": ("line", _csv),
    ".parquet": ("row", _parquet),
    ".txt": ("line", _text),
}
FILES = ".jsonl, .json, .csv or .txt, each perhaps with .gz behind it, or .parquet"
