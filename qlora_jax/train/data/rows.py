"""Finds raw rows: in files, folders and data sets on the hub."""

import importlib
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ..._jax.progress import progress_bar
from .model_files import ModelError
from .readers import (
    FILES,
    Rows,
    describe_path,
    open_rows,
    split_name,
    without_none,
)

_LISTED, _LONGEST = 10, 500  # problems, and characters of one
_ALIKE = 5  # rows that are listed of those that are wrong like another one
# Names of the files in a folder, by split.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")


class Source(NamedTuple):
    """A file, or a split of a data set, with its rows."""

    name: str
    unit: str  # that rows are counted in: "line" or "row"
    rows: Rows
    is_text: bool = False  # all of it is one text


def converted(source: Source, convert: Callable[[int, Any], Any]) -> Iterator[Any]:
    """Yields `convert(number, row)` of each row; at the end refuses wrong rows.

    Raises:
        ModelError: As `convert`, at once.
        ValueError: With a line for each kind of other errors.
    """
    found: dict[str, tuple[Exception, list[int]]] = {}
    title, rows = f"reading {source.name}", source.rows
    bar = progress_bar(title, " rows", iterable=rows, delay=2, leave=False)
    for number, raw in bar:
        try:
            if isinstance(raw, Exception):
                raise raw
            row = convert(number, raw)
        except ModelError:
            raise
        except (ValueError, RecursionError) as error:
            # Errors are of one kind if they differ only in numbers and after "Got".
            kind = re.sub(r"\d+", "0", str(error).partition(" Got ")[0])
            found.setdefault(kind, (error, []))[1].append(number)
        else:
            yield row
    unit, lines = source.unit, []
    for error, (first, *more) in found.values():
        lines.append(f"{unit} {first}: {error!s:.{_LONGEST}}")
        if more:
            s, dots = "s" * (len(more) > 1), ", ..." * (len(more) > _ALIKE)
            places = ", ".join(map(str, more[:_ALIKE])) + dots
            lines[-1] += (
                f" ... and {len(more):,} more row{s} like it, {unit}{s} {places}"
            )
    if lines:
        raise ValueError(f"{unit}s of {source.name} are wrong:\n  {listing(lines)}")


def listing(lines: list[str]) -> str:
    """Returns the first few lines, and how many more there are."""
    more = len(lines) - _LISTED
    rest = [f"and {more:,} more"] if more > 0 else []
    return "\n  ".join([*lines[:_LISTED], *rest])


def find_weights(data: str | pathlib.Path | Mapping[str, float]) -> dict[str, float]:
    """Returns data sets and their weights, from text such as "a.jsonl=0.7,b=0.3" too.

    One that is given alone has the weight 1.
    """
    if isinstance(data, Mapping):
        parts = [*data.items()]
    else:
        split = [part.rpartition("=") for part in str(data).split(",")]
        if pathlib.Path(data).exists() or not all(name for name, *_ in split):
            return {str(data): 1.0}
        parts = [(name.strip(), weight) for name, _, weight in split]
    try:
        found = {name: float(weight) for name, weight in parts}
        is_right = all(0 < weight < math.inf for weight in found.values())
        if not found or len(found) < len(parts) or not is_right:
            raise ValueError
    except ValueError:
        raise ValueError(
            "`data` must have a positive weight for each of several data sets, each "
            f"once, such as a.jsonl=0.7,b.jsonl=0.3. Got {data!r}."
        ) from None
    return found


def find_sources(path: str | pathlib.Path, notes: list[str]) -> dict[str, Source]:
    """Returns the splits of a file ("train"), of a folder or of a data set on the hub.

    A path that exists is never taken for a hub id. `notes` gets a line on unused files.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        names = {file.name: split_name(file) for file in files if file.name[0] != "."}
        stems = {name: found.stem for name, found in names.items() if found}
        splits = _by_split(stems, str(path), "file", [*names], notes)
        return {split: open_file(path / name) for split, name in splits.items()}
    if path.exists() or split_name(path) or not _HUB_ID.fullmatch(str(path)):
        return {"train": open_file(path)}
    return _from_hub(str(path), notes)


def _by_split(
    stems: Mapping[str, str], where: str, what: str, has: Collection[str], notes: list
) -> dict[str, str]:
    """Returns the name of each split; the stems of names tell which it is."""
    found = {}
    for split, known in SPLITS.items():
        names = [name for name, stem in stems.items() if stem in known]
        if len(names) > 1:
            raise ValueError(f"{where} must have one of {names}. Got all of them.")
        if names:
            found[split] = names[0]
    if "train" not in found:
        kinds = f" ({FILES})" if what == "file" else ""
        raise ValueError(
            f"{where} must have a {what} train{kinds}. It has {[*has][:_LISTED]}."
        )
    if unused := [name for name in stems if name not in found.values()]:
        known = [name for names in SPLITS.values() for name in names]
        notes.append(
            f"{where}: not used, for they are none of {', '.join(known)}: "
            + ", ".join(unused)
        )
    return found


def open_file(path: str | pathlib.Path, option: str = "data") -> Source:
    """Returns the rows of a file, the value of an option; they are read one by one."""
    path = pathlib.Path(path)
    name = split_name(path) if path.is_file() else None
    if name is None:
        others = ", a folder with a file train, or the id of a data set on the hub"
        raise ValueError(
            f"`{option}` must be a file ({FILES}){others * (option == 'data')}. Got "
            f"{describe_path(path)}."
        )
    unit, rows = open_rows(path, name)
    return Source(str(path), unit, rows, name.suffix == ".txt")


def _from_hub(name: str, notes: list[str]) -> dict[str, Source]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"`data` must be a file ({FILES}) or a folder. Got {describe_path(name)}. "
            "To read it from the Hugging Face hub: pip install datasets"
        ) from error
    try:
        found = datasets.load_dataset(*name.split(":"))
    except Exception as error:  # whatever the hub, the network or the files raise
        raise ValueError(
            f"`data` must be a file ({FILES}), a folder or the id of a data set on the "
            f"hub. Got {describe_path(name)}: {type(error).__name__}: {error}"
        ) from error
    return sources_of(name, found, notes)


def sources_of(
    name: str, splits: Mapping[str, Any], notes: list[str]
) -> dict[str, Source]:
    """Returns the splits of a `datasets.DatasetDict`."""
    rows = lambda split: ((i, without_none(r)) for i, r in enumerate(splits[split]))
    found = _by_split({x: x for x in splits}, name, "split", splits, notes)
    every = found.items()
    return {x: Source(f"{name}/{own}", "row", rows(own)) for x, own in every}
