"""Finds the raw rows of files, folders and data sets on the hub."""

import importlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from . import readers
from .model_files import ModelError
from .readers import FILES, RawRows, describe_path, is_readable

_MAX_LISTED, _MAX_CHARACTERS = 10, 500  # problems in a list, and characters of each
_MAX_NUMBERS = 5  # the numbers that are listed of rows with the same problem
# The names of the files in a folder, without suffix, for each split.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")


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
    for number, raw in bar:
        try:
            if isinstance(raw, Exception):
                raise raw
            row = convert(number, raw)
        except ModelError:
            raise
        except (ValueError, RecursionError) as error:
            # Errors that differ only in numbers and after "Got" are listed together.
            message = re.sub(r"\d+", "0", str(error).partition(" Got ")[0])
            errors.setdefault(message, (error, []))[1].append(number)
        else:
            yield row
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
    num_hidden = len(lines) - _MAX_LISTED
    ending = [f"and {num_hidden:,} more"] if num_hidden > 0 else []
    return "\n  ".join([*lines[:_MAX_LISTED], *ending])


def find_weights(data: str | pathlib.Path | Mapping[str, float]) -> dict[str, float]:
    """Returns the weight of each data set. Parses text like "a.jsonl=0.7,b=0.3"."""
    if isinstance(data, Mapping):
        parts = [*data.items()]
    else:
        splits = [part.rpartition("=") for part in str(data).split(",")]
        # `rpartition` leaves the name empty in a part without "=".
        is_mixture = all(name for name, _, _ in splits)
        # A single data set may have commas and equals signs in its path. An empty path
        # is an error, since it would be the current folder.
        if data and (os.path.exists(data) or not is_mixture):
            return {str(data): 1.0}
        parts = [(name.strip(), weight) for name, _, weight in splits]
    try:
        weights = {name: float(weight) for name, weight in parts}
        is_positive = all(0 < weight < math.inf for weight in weights.values())
        if not weights or len(weights) < len(parts) or not is_positive:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            "`data` must list each data set once, with a positive weight, such as "
            f"a.jsonl=0.7,b.jsonl=0.3. Got {data!r}."
        ) from None
    return weights


def find_sources(path: str | pathlib.Path, notes: list[str]) -> dict[str, Source]:
    """Returns the splits of a file, a folder, or a data set on the hub.

    A file has only the split "train". An existing path is never treated as a hub id.
    Adds a note on ignored files to `notes`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted(x for x in path.iterdir() if not x.name.startswith("."))
        # What has the name of a file of rows and is none, is an error.
        names = [file.name for file in files if file.is_file() or is_readable(file)]
        stems = {file.name: file.stem for file in files if is_readable(file)}
        splits = _assign_splits(stems, str(path), "file", names, notes)
        # A split may be in a format that no reader supports, as in valid.tsv.
        absent_stems = [stem for x in SPLITS if x not in splits for stem in SPLITS[x]]
        unread = [
            name
            for name in names
            if name not in stems and name.partition(".")[0] in absent_stems
        ]
        if unread:
            notes.append(
                f"{path}: ignored, since files must be {FILES}: {', '.join(unread)}"
            )
        return {split: open_file(path / name) for split, name in splits.items()}
    if path.exists() or is_readable(path) or not _HUB_ID.fullmatch(str(path)):
        alternatives = ", a folder with a file named train, or the id of a data set"
        return {"train": open_file(path, alternatives=alternatives)}
    return _open_from_hub(str(path), notes)


def _assign_splits(
    stems: Mapping[str, str],
    owner: str,
    kind: str,
    all_names: Collection[str],
    notes: list[str],
) -> dict[str, str]:
    # Returns the name of the file or of the hub's split for each of our splits. `stems`
    # maps the names that can be read to their stems. An error lists `all_names`.
    splits = {}
    for split, allowed in SPLITS.items():
        names = [name for name, stem in stems.items() if stem in allowed]
        if len(names) > 1:
            raise ValueError(f"{owner} must have one of {names}. Got all of them.")
        if names:
            splits[split] = names[0]
    if "train" not in splits:
        suffixes = f" ({FILES})" if kind == "file" else ""
        raise ValueError(
            f"{owner} must have a {kind} named train{suffixes}. Got "
            f"{[*all_names][:_MAX_LISTED]}."
        )
    if ignored := [name for name in stems if name not in splits.values()]:
        names = ", ".join(name for allowed in SPLITS.values() for name in allowed)
        notes.append(
            f"{owner}: ignored, since a {kind} must be named one of {names}: "
            + ", ".join(ignored)
        )
    return splits


def open_file(
    path: str | pathlib.Path, option: str = "data", alternatives: str = ""
) -> Source:
    """Returns the rows of a file, without reading it.

    In error messages, `option` is the name of the setting with the path, and
    `alternatives` lists what this setting accepts instead of a file.
    """
    path = pathlib.Path(path)
    if not (path.is_file() and is_readable(path)):
        expected = f"a file ({FILES}){alternatives}"
        raise ValueError(f"`{option}` must be {expected}. Got {describe_path(path)}.")
    unit, rows = readers.open_rows(path)
    return Source(str(path), unit, rows, path.suffix.lower() == ".txt")


def _open_from_hub(name: str, notes: list[str]) -> dict[str, Source]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"`data` must be a file ({FILES}) or a folder. Got {describe_path(name)}. "
            "If it is a data set on the Hugging Face hub: pip install datasets"
        ) from error
    try:
        splits = datasets.load_dataset(*name.split(":"))
    except Exception as error:  # the hub, the network and the files raise many types
        raise ValueError(
            f"`data` must be a file ({FILES}) or a folder. Got {describe_path(name)}. "
            "It cannot be read from the Hugging Face hub either: "
            f"{type(error).__name__}: {error}"
        ) from error
    return sources_of(name, splits, notes)


def sources_of(
    name: str, splits: Mapping[str, Any], notes: list[str]
) -> dict[str, Source]:
    """Returns the splits of a `datasets.DatasetDict`."""

    def rows(hub_split):
        for index, row in enumerate(splits[hub_split]):
            yield index, readers.without_none(row)

    hub_splits = _assign_splits({x: x for x in splits}, name, "split", splits, notes)
    return {
        split: Source(f"{name}/{hub_split}", "row", rows(hub_split))
        for split, hub_split in hub_splits.items()
    }
