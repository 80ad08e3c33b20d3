"""Raw rows of training data: JSONL files, folders of them, data sets of the hub."""

import importlib
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import qlora_jax as ql

MAX_LINE_BYTES = 64 << 20
_LISTED, _LONGEST = 10, 500  # problems, and characters of one
# The files of a folder, by split; the first name that is there.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(?<!\.jsonl)(?<!\.json)(:[\w.-]+)?")


class Source(NamedTuple):
    """Where rows come from.

    Attributes:
        name: The file, or the data set with its split.
        unit: What the rows of it are counted in: "line" or "row".
        rows: A value or an error for each number.
    """

    name: str
    unit: str
    rows: "Iterator[tuple[int, Any]]"

    def place(self, number: int) -> str:
        """Names a row, as "train.jsonl:17"."""
        return f"{self.name}:{number}"


class Problems:
    """What is wrong with the rows of a source; the first ones are listed."""

    def __init__(self, source: Source):
        self.source, self.listed, self.count = source, [], 0

    def add(self, number: int, problem: object) -> None:
        """Notes what is wrong with a row."""
        self.count += 1
        if self.count <= _LISTED:
            self.listed.append(f"{self.source.unit} {number}: {problem!s:.{_LONGEST}}")

    def refuse(self) -> None:
        """Raises ValueError if there were any."""
        if self.count:
            raise ValueError(
                f"{self.source.unit}s of {self.source.name} are wrong:\n  "
                + listing(self.listed, self.count)
            )


def listing(lines: list[str], count: int | None = None) -> str:
    """Returns the first few lines, and how many more there are of `count`."""
    more = (len(lines) if count is None else count) - _LISTED
    rest = [f"and {more:,} more"] if more > 0 else []
    return "\n  ".join([*lines[:_LISTED], *rest])


def find_sources(path: str | pathlib.Path) -> dict[str, Source]:
    """Returns the splits of a JSONL file, of a folder or of a data set on the hub.

    Args:
        path: A file, which is the split "train"; a folder with train.jsonl, and
            perhaps valid.jsonl (or validation.jsonl) and test.jsonl; or the id of a
            data set on the Hugging Face hub, which needs the package `datasets`, as
            "user/name", or "user/name:subset". What exists is never taken for an id.

    Raises:
        ValueError: If it is none of them.
        ImportError: If `datasets` is needed and not installed.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return {split: jsonl(file) for split, file in _files(path).items()}
    if path.is_file():
        return {"train": jsonl(path)}
    if path.exists() or not _HUB_ID.fullmatch(str(path)):
        raise ValueError(
            "`data` must be a file, a folder or the id of a data set on the hub. Got "
            f"{str(path)!r}."
        )
    return _from_hub(str(path))


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    found = {}
    for split, names in SPLITS.items():
        files = [folder / f"{name}.jsonl" for name in names]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise ValueError(
                f"{folder} must have one of {[file.name for file in files]}. Got both."
            )
        if files:
            found[split] = files[0]
    if "train" not in found:
        has = sorted(file.name for file in folder.iterdir())[:_LISTED]
        raise ValueError(f"{folder} must have a file train.jsonl. It has {has}.")
    return found


def jsonl(path: str | pathlib.Path) -> Source:
    """Returns the rows of a JSONL file, which are read one by one.

    The number of a row is that of its line; empty lines are left out. What is no JSON
    is an error in the place of a value.

    Raises:
        ValueError: While the rows are read: if the file has none, or changes.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(f"`data` must be a file. Got {str(path)!r}.")
    return Source(str(path), "line", _lines(pathlib.Path(path)))


def _lines(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
    number, read, empty = 0, 0, True
    with path.open("rb") as file:
        before = _stamp(os.fstat(file.fileno()))
        while line := file.readline(MAX_LINE_BYTES + 1):
            number, read = number + 1, read + len(line)
            if len(line) > MAX_LINE_BYTES:
                yield number, ValueError(f"it must have at most {MAX_LINE_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                    read += len(line)
                empty = False
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                empty = False
                yield number, _parse(line)
        after = _stamp(os.fstat(file.fileno()))
    try:
        named = _stamp(path.stat())
    except OSError:
        named = None
    if not before == after == named or read != before[0]:
        raise ValueError(f"{path} must not change while it is read. It did.")
    if empty:
        raise ValueError(f"{path} must have rows. Got none.")


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def _parse(line: bytes) -> Any:
    try:
        found = ql.io.parse_json(line, "it")
    except ValueError as error:
        return error
    if not isinstance(found, dict):
        return ValueError(f"it must be a JSON object. Got {found!r:.40}.")
    return found


def _from_hub(name: str) -> dict[str, Source]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"`data` must be a file or a folder. Got {name!r}. To read it from the "
            "Hugging Face hub: pip install datasets"
        ) from error
    try:
        found = datasets.load_dataset(*name.split(":"))
    except Exception as error:  # whatever the hub, the network or the files raise
        raise ValueError(
            "`data` must be a file, a folder or the id of a data set on the hub. Got "
            f"{name!r}: {type(error).__name__}: {error}"
        ) from error
    return sources_of(name, found)


def sources_of(name: str, splits: Mapping[str, Any]) -> dict[str, Source]:
    """Returns the splits of a `datasets.DatasetDict`."""
    sources = {}
    for split, names in SPLITS.items():
        for known in names:
            if known in splits and split not in sources:
                rows = ((i, _without_none(r)) for i, r in enumerate(splits[known]))
                sources[split] = Source(f"{name}/{known}", "row", rows)
    if "train" not in sources:
        raise ValueError(f"{name} must have a split train. It has {sorted(splits)}.")
    return sources


def _without_none(value: Any) -> Any:
    """Leaves out what Arrow fills in where a row has no such key."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value
