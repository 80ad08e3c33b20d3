"""Reads files that may be broken or hostile, and writes files atomically."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from ..trees.paths import refuse_listed

Path = str | pathlib.Path

# The temporary folders of `new_path` that hold nothing complete.
_unfinished: set[str] = set()

# Limits of an error: names of each kind, lines, and characters of a line.
_NAMES, _LINES, _WIDTH = 200, 60, 320


class CheckpointError(ValueError):
    """A file is broken, hostile, or of another model.

    Example:
        >>> import qlora_jax as ql
        >>> issubclass(ql.io.CheckpointError, ValueError)
        True
    """


def require(is_right: bool, message: str) -> None:
    """Raises CheckpointError with `message` unless `is_right`."""
    if not is_right:
        raise CheckpointError(message)


def refuse(title: str, problems: Iterable[str]) -> None:
    """Raises CheckpointError that lists the problems, if there are any."""
    lines = [line[:_WIDTH] for line in dict.fromkeys(problems)]
    more = len(lines) - _LINES
    rest = [f"and {more} more"] if more > 0 else []
    refuse_listed(title, lines[:_LINES] + rest, CheckpointError)


def refuse_names(**problems: Iterable[str]) -> None:
    """Raises CheckpointError that lists the names of each kind of problem, if any."""
    listed = {kind: sorted(names) for kind, names in problems.items()}
    lines = [
        f"{kind}: {', '.join(names[:_NAMES])}"
        + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
        for kind, names in listed.items()
        if names
    ]
    refuse_listed("these are not the tensors of the model", lines, CheckpointError)


def parse_json(data: bytes, what: str) -> Any:
    """Returns the value of strict JSON.

    Args:
        data: The JSON, in UTF-8.
        what: Its name in errors.

    Raises:
        CheckpointError: If it is no JSON in UTF-8, has a key twice, NaN or infinity.

    Example:
        >>> import qlora_jax as ql
        >>> ql.io.parse_json(b'{"a": [1, 2]}', "the file")
        {'a': [1, 2]}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in found if keys.count(key) > 1})[:5]
            raise CheckpointError(f"{what} has keys twice: {twice}.")
        return found

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"{what} must be strict JSON. Got {constant}.")

    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} must be JSON. {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object that a file holds; refuses all else."""
    found = parse_json(pathlib.Path(path).read_bytes(), str(path))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return found


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, indented."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    pathlib.Path(path).write_text(text, "utf-8")


def member(folder: Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder, by a name that comes from a file.

    The name may not lead out of the folder, except to the hub cache's `blobs`.
    """
    folder = pathlib.Path(folder)
    if not re.fullmatch(r"[^/\\\x00-\x1f:]+", name) or name in (".", ".."):
        raise CheckpointError(f"{folder} must name its files plainly. Got {name!r}.")
    path = folder / name
    try:
        real = path.resolve(strict=True)
        is_file = real.is_file()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} must be a file. {error}") from error
    if not is_file:
        raise CheckpointError(f"{path} must be a file.")
    root = folder.resolve()
    cache = [x.parent for x in (root, *root.parents) if x.name == "snapshots"][:1]
    homes = [root, *(x / "blobs" for x in cache)]
    if not any(home in real.parents for home in homes):
        raise CheckpointError(f"{path} must be in its folder. It is a link to {real}.")
    return path


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[pathlib.Path]:
    """Gives a temporary path, and renames it to `path` if the block succeeds.

    It replaces a file or folder at `path`. After an error nothing is left.

    Args:
        path: The file or the folder. Its parent is made if it does not exist.

    Yields:
        A path at which nothing exists yet, in a temporary folder of its own.

    Example:
        >>> import pathlib, tempfile, qlora_jax as ql
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with ql.io.new_path(path) as new:
        ...     _ = new.write_text("all of it")
        >>> path.read_text()
        'all of it'
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as near:
        new, old = pathlib.Path(near) / "new", pathlib.Path(near) / "old"
        _unfinished.add(near)
        yield new
        if new.is_file():
            with new.open("rb") as file:
                os.fsync(file.fileno())
        _unfinished.discard(near)  # between two renames it holds the old folder
        if new.is_dir() and path.is_dir():
            os.replace(path, old)  # a rename replaces an empty folder only
        os.replace(new, path)


def delete_unfinished() -> None:
    """Deletes what `new_path` has not renamed, where no `finally` block will run."""
    for folder in _unfinished:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """As `new_path`, with a folder, if `path` does not exist or is an empty folder."""
    path = pathlib.Path(path)
    if path.is_symlink() or path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"the folder to write must be new or empty. Got {path}.")
    with new_path(path) as folder:
        folder.mkdir()
        yield folder
