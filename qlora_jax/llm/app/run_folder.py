"""Locks, reads and writes the folder of a run, where Orbax also saves states."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import qlora_jax as ql

from ..reading import reading
from .train_config import TrainConfig

STATE, CONFIG, METRICS = "state", "config.yaml", "metrics.jsonl"
ANSWERS, RESULT = "answers.jsonl", "result.json"
TEMPLATE = "template.jinja"  # a copy of the file in the option `template`
SYSTEM = "system.txt"  # the system message, if all rows of the data share one
_FIRST_LINE = "# The weights of the model: "  # of `CONFIG`
LOG_ID = "log_id"  # identifies the run for W&B and trackio


def is_run(folder: pathlib.Path) -> bool:
    """Returns whether a folder is the folder of a training run."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


@contextlib.contextmanager
def open_run_folder(out: str, resume: bool) -> Iterator[pathlib.Path]:
    """Yields the locked folder of a run; deletes it if it is new and stays empty."""
    if "://" in out:  # pathlib would take it for a path in the current folder
        raise ValueError(
            f"`out` must be a path, such as that of a mounted bucket. Got {out!r}."
        )
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder. Got the file {folder}.")
    is_new = not folder.exists()  # then it is deleted if a check fails
    has_config = (folder / CONFIG).is_file()
    if resume and not has_config:
        raise ValueError(
            f"`out` must have a run to resume. Got {folder}, which has no {CONFIG}."
        )
    if resume:
        ql.io.files.check_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder):
            if not resume and not _is_untrained(folder):
                contents = "other files"
                if has_config:
                    contents = "a run. Use `--resume` to continue it"
                raise ValueError(
                    f"`out` must be new or empty. Got {folder}, which has {contents}."
                )
            yield folder
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()


def _is_untrained(folder: pathlib.Path) -> bool:
    """Returns whether a folder only has what a run writes before its first step."""

    def is_beginning(path: pathlib.Path) -> bool:
        if path.is_symlink() or path.is_dir():
            return not path.is_symlink()
        if path.name == CONFIG:
            return path.read_bytes().startswith(_FIRST_LINE.encode())
        if path.name in (TEMPLATE, SYSTEM):
            return path.with_name(CONFIG).is_file()
        is_unfinished = ".unfinished-" in str(path.relative_to(folder))
        return is_unfinished or path.name == METRICS and not path.stat().st_size

    return all(map(is_beginning, folder.rglob("*")))


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # on Windows, which has no such locks
        yield
        return
    # The system releases the lock when the process ends, even if it is killed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another run is using `out`. Choose another folder. Got {folder}."
            ) from error
        except OSError as error:  # NFS can lock files, but not folders
            print(
                f"Cannot lock {folder} ({error.strerror}). Make sure that no other run "
                "uses it.",
                file=sys.stderr,
            )
        yield
    finally:
        os.close(descriptor)


def write_run_config(config: TrainConfig, source: str, system: str | None) -> None:
    """Writes the settings as a file for `--config`, and the source of the weights.

    Commands that use the run find its chat template and the system message of its rows
    beside this file.
    """
    import yaml

    path = pathlib.Path(config.out) / CONFIG
    if system is not None:
        write_text(path.with_name(SYSTEM), system)
    if (template := config.template) is not None:
        text = pathlib.Path(template).read_text("utf-8")
        write_text(path.with_name(TEMPLATE), text)
    # Settings of a single call or process are reset, because all processes of a later
    # run read this file.
    transient: dict[str, Any] = {"resume": False}
    transient["distributed"] = bool(config.distributed)
    if config.epochs is not None:
        transient["steps"] = None  # they follow from the epochs, which may change
    text = yaml.safe_dump(config.to_settings() | transient, sort_keys=False)
    write_text(path, f"{_FIRST_LINE}{source}.\n{text}")


def read_run_config(path: pathlib.Path) -> TrainConfig:
    """Reads a file that `write_run_config` wrote.

    The folder of the run is that of the file, which may have been moved, or come from a
    stranger. Its chat template is the copy in this folder, whatever path the file has.
    """
    import yaml

    ql.io.files.check_links(path.parent, [path.name, TEMPLATE])
    with reading(path):
        text = path.read_text("utf-8")
        config = TrainConfig.from_settings(dict(yaml.safe_load(text)))
    if config.template is not None:
        config = config.replace(template=str(path.with_name(TEMPLATE)))
    return config.replace(out=str(path.parent))


def read_system_message(config: TrainConfig) -> str | None:
    """Returns the system message that all rows of a run's data share, if they do."""
    folder = pathlib.Path(config.out)
    ql.io.files.check_links(folder, [SYSTEM])
    path = folder / SYSTEM
    with reading(path):
        return path.read_text("utf-8") if path.is_file() else None


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    with ql.io.files.new_path(path) as new:
        new.write_text(text, "utf-8")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's threads from printing tracebacks of errors that are also raised."""
    from absl import logging

    logger = logging.get_absl_logger()
    old_level = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(old_level)
