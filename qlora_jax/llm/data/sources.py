"""Finds the raw rows of files, folders and data sets on the hub."""

import importlib
import math
import os
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from .readers import (
    FILES,
    MAX_LISTED,
    Source,
    describe_path,
    is_readable,
    open_file,
    without_none,
)

# The names of the files in a folder, without suffix, for each split.
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+(:[\w.-]+)?")


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
        splits = _assign_splits(stems, str(path), f"file ({FILES})", names, notes)
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
        raise ValueError(
            f"{owner} must have a {kind} named train. Got {[*all_names][:MAX_LISTED]}."
        )
    valid_names = [name for allowed in SPLITS.values() for name in allowed]
    # A split may be in a format that no reader supports, as in valid.tsv.
    if ignored := [
        name
        for name in all_names
        if name not in splits.values()
        and (name in stems or name.partition(".")[0] in valid_names)
    ]:
        notes.append(
            f"{owner}: ignored, since each split must be one {kind} with one of the "
            f"names {', '.join(valid_names)}: {', '.join(ignored)}"
        )
    return splits


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
            yield index, without_none(row)

    hub_splits = _assign_splits({x: x for x in splits}, name, "split", splits, notes)
    return {
        split: Source(f"{name}/{hub_split}", "row", rows(hub_split))
        for split, hub_split in hub_splits.items()
    }
