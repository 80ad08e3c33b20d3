"""Reads files that may be broken or hostile, and writes files atomically."""

import contextlib
import errno
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ..trees.paths import raise_if_any

Path = str | pathlib.Path

# The beginning of a URL. pathlib turns "gs://bucket" into "gs:/bucket".
_URL = re.compile("[a-z][a-z0-9]+:/")

# A hostile file can cause thousands of problems with names of any length. These limits
# apply to error messages: the names of each kind, the lines, and a line's length.
_MAX_NAMES, _MAX_LINES, _MAX_LINE_LENGTH = 200, 60, 320


class CheckpointError(ValueError):
    """A file is broken, hostile, or does not belong to the model.

    Example:
        >>> import qlora_jax as ql
        >>> issubclass(ql.io.CheckpointError, ValueError)
        True
    """


def require(is_valid: bool, message: str) -> None:
    """Raises a CheckpointError with `message` unless `is_valid`."""
    if not is_valid:
        raise CheckpointError(message)


def refuse(title: str, problems: Iterable[str]) -> None:
    """Raises a CheckpointError that lists the distinct problems, if there are any."""
    lines = [line[:_MAX_LINE_LENGTH] for line in dict.fromkeys(problems)]
    num_hidden = len(lines) - _MAX_LINES
    ending = [f"and {num_hidden} more"] if num_hidden > 0 else []
    raise_if_any(title, lines[:_MAX_LINES] + ending, CheckpointError)


def refuse_names(names_by_problem: Mapping[str, Iterable[str]]) -> None:
    """Raises a CheckpointError that lists names by problem, if there are any."""
    lines = []
    for problem, names in names_by_problem.items():
        if listed := sorted(names):
            num_hidden = len(listed) - _MAX_NAMES
            ending = f" and {num_hidden} more" if num_hidden > 0 else ""
            lines.append(f"{problem}: {', '.join(listed[:_MAX_NAMES])}{ending}")
    raise_if_any("the tensors do not match the model", lines, CheckpointError)


def parse_json(data: bytes, source: str) -> Any:
    """Returns the value that strict JSON describes."""

    # `json` would keep the last of several equal keys, where other readers keep the
    # first, so the same file could mean different things to different programs.
    def dict_of_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            duplicates = sorted(key for key, count in counts.items() if count > 1)[:5]
            raise CheckpointError(f"{source} has duplicate keys: {duplicates}.")
        return values

    def refuse_constant(constant: str) -> NoReturn:
        raise CheckpointError(f"{source} must be strict JSON. Got {constant}.")

    def finite_float(text: str) -> float:
        # Python reads 1e999 as infinity.
        if math.isinf(value := float(text)):
            raise CheckpointError(f"{source} must have finite numbers. Got {text:.80}.")
        return value

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=dict_of_unique_keys,
            parse_constant=refuse_constant,
            parse_float=finite_float,
        )
    except CheckpointError:
        raise
    # Deeply nested JSON raises RecursionError.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} must be JSON. {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises CheckpointError for other values."""
    value = parse_json(pathlib.Path(path).read_bytes(), str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Writes strict JSON, indented."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    pathlib.Path(path).write_text(text, "utf-8")


def member(folder: Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder, for a name that may be hostile.

    Such names come from a checkpoint's index. Without the checks, a name with a slash,
    or a link out of the folder, could expose any file that the user can read.
    """
    folder = pathlib.Path(folder)
    if not re.fullmatch(r"[^/\\\x00-\x1f:]+", name) or name in (".", ".."):
        raise CheckpointError(
            f"{folder} must list plain file names, without folders. Got {name!r}."
        )
    check_links(folder, [name])
    if not (path := folder / name).is_file():
        raise CheckpointError(f"{path} must be a file.")
    return path


def check_links(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raises CheckpointError if a link leads out of a folder of a model or a run.

    Such a link could expose, overwrite or delete any file of the user. In the hub's
    cache, `models--x/snapshots/<commit>/` has links to the files in `models--x/blobs/`,
    which are allowed.
    """
    folder = pathlib.Path(folder)
    root = pathlib.Path(os.path.realpath(folder))
    snapshots = [x for x in (root, *root.parents) if x.name == "snapshots"]
    allowed = [root, *(x.parent / "blobs" for x in snapshots[:1])]
    paths = [folder / name for name in names or ()]
    if names is None:
        for parent, folders, files in os.walk(folder):  # does not follow links
            paths += [pathlib.Path(parent, name) for name in (*folders, *files)]
    for path in filter(os.path.islink, paths):
        real = pathlib.Path(os.path.realpath(path))
        if not any(parent in real.parents for parent in allowed):
            raise CheckpointError(
                f"{path} must be in its folder. It is a link to {real}."
            )


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path, and renames it to `path` if the block succeeds.

    A file at `path` is replaced by a new file, and a folder by a new folder. If the
    block raises, `path` is unchanged, and the temporary path is deleted.
    """
    if _URL.match(str(path)):  # pathlib would take it for a path in the current folder
        raise ValueError(
            "A file must be written to a path, such as that of a mounted bucket. Got "
            f"{str(path)!r}."
        )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.unfinished-"
    _delete_leftovers(path, prefix)
    # The temporary folder is on the same file system as `path`, so that a rename does
    # not copy.
    temporary_folder = tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent)
    with temporary_folder as temporary, _locked(temporary):
        new = pathlib.Path(temporary) / "new"
        try:
            yield new
        except OSError as error:
            if error.filename and not str(error.filename).startswith(temporary):
                raise
            # `write` names no file, and NumPy only counts the bytes if a disk is full.
            reason = error.strerror or f"the disk may be full: {error}"
            raise OSError(error.errno or errno.ENOSPC, reason, str(path)) from error
        if new.is_file():
            # Otherwise a power failure after the rename could leave an empty file.
            with new.open("rb") as file:
                os.fsync(file.fileno())
        old = pathlib.Path(temporary) / "old"
        try:
            if new.is_dir() and path.is_dir():
                os.replace(path, old)  # a rename cannot replace a folder with files
            os.replace(new, path)
        except BaseException:  # also at an interrupt between the two renames
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder, and yields whether this has succeeded.

    The system releases the lock when the process ends, even if it is killed. Windows
    and some network file systems have no such locks.
    """
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except (ImportError, OSError):
        is_locked = False
    try:
        yield is_locked
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _delete_leftovers(path: pathlib.Path, prefix: str) -> None:
    """Deletes the temporary folders of `new_path` whose processes were killed."""
    for folder in path.parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink():
            continue
        with contextlib.suppress(OSError), _locked(folder) as is_locked:
            if not is_locked or not {*os.listdir(folder)} <= {"new", "old"}:
                continue
            # The process was killed between two renames.
            if (folder / "old").exists() and not path.exists():
                os.replace(folder / "old", path)
            shutil.rmtree(folder)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[pathlib.Path]:
    """Yields a folder as `new_path` does. `path` must be missing or an empty folder."""
    path = pathlib.Path(path)
    # `new_path` would replace a link, not the folder that it leads to.
    if path.is_symlink() or path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"the folder to write must be new or empty. Got {path}.")
    with new_path(path) as folder:
        folder.mkdir()
        yield folder
