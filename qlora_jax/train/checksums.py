"""Checksums of a state's files."""

import hashlib
import os
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

NAME = "checksums.txt"  # in the format of `sha256sum`, with its checksum at the end
# Orbax writes these two while or after the checksums are; neither has any values.
_OTHERS = ("_CHECKPOINT_METADATA", "commit_success.txt", NAME)
_FAULTS = ("is missing", "has other contents than were saved", "cannot be read")


def write_checksums(folder: pathlib.Path) -> None:
    """Writes the checksums of all files in a folder that is not yet renamed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = [f"{_hash(folder / n)}  {n}\n" for n in names if n not in _OTHERS]
    text = "".join(lines)
    with (folder / NAME).open("x", encoding="utf-8") as file:
        file.write(f"{text}# {hashlib.sha256(text.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())


def find_faults(folder: pathlib.Path) -> list[str]:
    """Returns what is wrong with a state's files. All processes must call it."""
    try:
        wanted = _read(folder)
    except ValueError:
        return [f"{NAME} {_FAULTS[1]}"]
    except OSError as error:
        return [f"{NAME} {_FAULTS[0 if isinstance(error, FileNotFoundError) else 2]}"]
    names, mine = sorted(wanted), np.zeros(len(wanted), np.int32)
    # Each process reads its share of the files.
    first, count = jax.process_index(), jax.process_count()
    for index in range(first, len(names), count):
        mine[index] = _fault(folder / names[index], wanted[names[index]])
    all_of = multihost_utils.process_allgather(mine).max(axis=0)
    return [f"{n} {_FAULTS[k - 1]}" for n, k in zip(names, all_of, strict=True) if k]


def _read(folder: pathlib.Path) -> dict[str, str]:
    text, _, sum_of_text = (folder / NAME).read_text("utf-8").rpartition("# ")
    if sum_of_text != hashlib.sha256(text.encode()).hexdigest() + "\n":
        raise ValueError
    return {line[66:]: line[:64] for line in text.splitlines()}


def _fault(path: pathlib.Path, wanted: str) -> int:
    """Returns a file's fault as an index into `_FAULTS` from 1; 0 for none."""
    try:
        return 0 if _hash(path) == wanted else 2
    except FileNotFoundError:
        return 1
    except OSError:  # such as of a failing disk
        return 3


def _hash(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
