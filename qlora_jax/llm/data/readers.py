"""Reads the raw rows of a file. The suffix of the file selects the reader."""

import codecs
import contextlib
import csv
import importlib
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from qlora_jax.io.files import parse_json

from ..reading import ModelError

MAX_BYTES = 64 << 20  # of a line, or of a file with one text
_BOM = b"\xef\xbb\xbf"  # Windows programs write it at the start of UTF-8 files
# Yields the number of each row, and the row as it is in the file, or an error.
RawRows = Iterator[tuple[int, Any]]
MAX_LISTED, _MAX_CHARACTERS = 10, 500  # problems in a list, and characters of each
_MAX_NUMBERS = 5  # the numbers that are listed of rows with the same problem


class Source(NamedTuple):
    """A file or a split of a data set."""

    name: str
    unit: str  # in which rows are counted: "line" or "row"
    rows: RawRows
    is_text: bool = False  # whether the whole file is one text


def convert_rows(source: Source, convert: Callable[[int, Any], Any]) -> Iterator[Any]:
    """Yields `convert(number, row)` for each row, and at the end rejects bad rows."""
    # A `ModelError` is raised at once. Other errors are collected, since a user wants
    # to fix all of them together. For each message, `errors` has the first error with
    # this message, and the numbers of all rows that cause it.
    errors: dict[str, tuple[Exception, list[int]]] = {}
    bar = tqdm(
        source.rows,
        f"reading {source.name}",
        unit=" rows",
        disable=None,  # shown only if stderr is a terminal
        delay=2,
        leave=False,
    )
    number = None
    for number, raw in bar:
        try:
            if isinstance(raw, Exception):
                raise raw
            if not isinstance(raw, dict):
                raise ValueError(f"the row must be a JSON object. Got {raw!r:.40}.")
            row = convert(number, raw)
        except ModelError:
            raise
        except (ValueError, RecursionError) as error:
            # Errors that differ only in numbers and after "Got" are listed together.
            message = re.sub(r"\d+", "0", str(error).partition(" Got ")[0])
            errors.setdefault(message, (error, []))[1].append(number)
        else:
            yield row
    if number is None:
        raise ValueError(f"{source.name} must have rows. Got none.")
    unit, lines = source.unit, []
    for error, (first, *repeats) in errors.values():
        lines.append(f"{unit} {first}: {error!s:.{_MAX_CHARACTERS}}")
        if repeats:
            s = "s" if len(repeats) > 1 else ""
            numbers = ", ".join(map(str, repeats[:_MAX_NUMBERS]))
            numbers += ", ..." if len(repeats) > _MAX_NUMBERS else ""
            lines[-1] += f" ... and {len(repeats):,} more row{s} like it, "
            lines[-1] += f"{unit}{s} {numbers}"
    if lines:
        raise ValueError(f"{unit}s of {source.name} are wrong:\n  {listing(lines)}")


def listing(lines: list[str]) -> str:
    """Returns the first few lines, and the number of the remaining ones."""
    num_hidden = len(lines) - MAX_LISTED
    ending = [f"and {num_hidden:,} more"] if num_hidden > 0 else []
    return "\n  ".join([*lines[:MAX_LISTED], *ending])


def is_readable(path: pathlib.Path) -> bool:
    """Returns whether there is a reader for files of this name."""
    return path.suffix.lower() in READERS


def open_file(
    path: str | pathlib.Path, option: str = "data", alternatives: str = ""
) -> Source:
    """Returns the rows of a file, without reading it.

    In error messages, `option` is the name of the setting with the path, and
    `alternatives` lists what this setting accepts instead of a file.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if not (path.is_file() and suffix in READERS):
        expected = f"a file ({FILES}){alternatives}"
        raise ValueError(f"`{option}` must be {expected}. Got {describe_path(path)}.")
    unit, read = READERS[suffix]
    # Many .json files are JSON lines: their first line is an object by itself.
    if suffix == ".json" and isinstance(next(_read_jsonl(path), (0, 0))[1], dict):
        unit, read = READERS[".jsonl"]
    return Source(str(path), unit, read(path), suffix == ".txt")


def describe_path(path: str | pathlib.Path) -> str:
    """Returns a path for an error message, which says if nothing exists there."""
    return f"{str(path)!r}{'' if pathlib.Path(path).exists() else ', which is missing'}"


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        try:
            yield file
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None):  # from the disk, and not from the reader
                raise
            raise ValueError(f"{path} must be a {path.suffix} file. {error}") from error


def _read_jsonl(path: pathlib.Path) -> RawRows:
    # Yields the row of each line that is not blank.
    with _open(path) as file:
        # The limit keeps a file without line breaks from filling the memory.
        lines = iter(lambda: file.readline(MAX_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_BYTES:
                problem = f"the row must have at most {MAX_BYTES} bytes."
                yield number, ValueError(problem)
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_BYTES)
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            try:
                row = parse_json(line.rstrip(), "the row")
            except ValueError as error:
                # The number of the line is always that of the first one.
                row = ValueError(re.sub(r"line 1 (?=column)", "", str(error)))
            yield number, row


def _read_json(path: pathlib.Path) -> RawRows:
    with _open(path) as file:
        rows = parse_json(file.read().removeprefix(_BOM), "The file")
        if not isinstance(rows, list):
            keys = f"an object with {[*rows]}" if isinstance(rows, dict) else repr(rows)
            raise ValueError(
                "The file must be a list of rows, or have one row per line. Got "
                f"{keys:.200}."
            )
    yield from enumerate(rows)


def _read_csv(path: pathlib.Path) -> RawRows:
    with _open(path) as file:
        # The first record names the columns.
        reader = csv.reader(codecs.iterdecode(file, "utf-8-sig"), strict=True)
        names = _next_record(reader) or []
        if len({*names}) < len(names):
            raise ValueError(f"The columns must have different names. Got {names}.")
        while True:
            # A record may span several lines; its number is that of its first line.
            number, record = reader.line_num + 1, _next_record(reader)
            if record is None:
                return
            if record and len(record) != len(names):
                problem = f"the row must have {len(names)} fields, as the header has."
                yield number, ValueError(f"{problem} Got {len(record)}.")
            elif record:
                yield number, dict(zip(names, record, strict=True))


def _next_record(reader: Any) -> list[str] | None:
    # The limit is global to the process, so it is only changed for a moment.
    old_limit = csv.field_size_limit(MAX_BYTES)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"Line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(old_limit)


def _read_parquet(path: pathlib.Path) -> RawRows:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            "Parquet files need: pip install 'qlora-jax[parquet]'"
        ) from error
    # A file can be much smaller than its rows, because it stores equal texts once. So
    # only a few rows are in memory at a time, and only one as Python's objects.
    with _open(path) as file:
        batches = parquet.ParquetFile(file).iter_batches(4)
        slices = (batch.slice(i, 1) for batch in batches for i in range(batch.num_rows))
        yield from enumerate(without_none(row.to_pylist()[0]) for row in slices)


def without_none(value: Any) -> Any:
    """Drops the None that Arrow fills in where a row does not have a key."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value


def _read_text(path: pathlib.Path) -> RawRows:
    with _open(path) as file:
        data = file.read(MAX_BYTES + 1).removeprefix(_BOM)
        if len(data) > MAX_BYTES:
            raise ValueError(f"The file must have at most {MAX_BYTES} bytes.")
        text = data.decode("utf-8")
    if text:
        yield 1, {"text": text}


# For each suffix, the unit of row numbers and the reader.
READERS: dict[str, tuple[str, Callable[[pathlib.Path], RawRows]]] = {
    ".jsonl": ("line", _read_jsonl),
    ".json": ("row", _read_json),
    ".csv": ("line", _read_csv),
    ".parquet": ("row", _read_parquet),
    ".txt": ("line", _read_text),
}
FILES = ".jsonl, .json, .csv, .txt or .parquet"
