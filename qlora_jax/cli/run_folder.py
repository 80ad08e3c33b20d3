"""Locks, reads and writes the folder of a run, in which Orbax writes states."""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import qlora_jax as ql

from .train_config import TrainConfig

STATE, CONFIG, METRICS = "state", "config.yaml", "metrics.jsonl"
ANSWERS, RESULT = "answers.jsonl", "result.json"
FAILED = "failed.txt"  # why a run of several ended
LOG_ID = "log_id"  # the name of the run for W&B and trackio


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a run of train."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


@contextlib.contextmanager
def run_folder(out: str, resume: bool) -> Iterator[pathlib.Path]:
    """Gives the locked folder of a run; deletes it if it is new and stays empty."""
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder. Got the file {folder}.")
    is_new = not folder.exists()
    if resume and not (folder / CONFIG).is_file():
        raise ValueError(
            f"`resume` must find a run in `out`. Got {folder}, which has no {CONFIG}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder):
            if not resume and any(folder.iterdir()):
                is_run = (folder / CONFIG).is_file()
                advice = "Give `--resume` to go on with the run in it."
                raise ValueError(
                    f"`out` must be new or empty. Got {folder}, which has "
                    + (f"a run. {advice}" if is_run else "files that are not a run's.")
                )
            yield folder
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Locks the folder; the system unlocks it whenever the process ends."""
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"`out` must be of no other run. Another one is using {folder}."
            ) from error
        except OSError as error:  # NFS locks files alone
            print(
                f"{folder} cannot be locked ({error.strerror}): see that no other run "
                "uses it.",
                file=sys.stderr,
            )
        yield
    finally:
        os.close(number)


def write_settings(config: TrainConfig, path: pathlib.Path, source: str) -> None:
    """Writes the settings as a file for `--config`, and where the weights are from."""
    import yaml

    # Settings of one process are not written: all read the file with `--config`.
    ours = {"resume": False, "resume_step": None, "process_id": None}
    config = dataclasses.replace(config, **ours)
    settings = dataclasses.asdict(config)
    text = yaml.safe_dump(settings, sort_keys=False)
    write_text(path, f"# The weights of the model: {source}.\n{text}")


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_settings` wrote."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be the settings of a run. {error}") from error
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    if not isinstance(found, dict) or not {"model", "data", "out"} <= {*found} <= names:
        raise ValueError(f"{path} must be the settings of a run.")
    return found


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically."""
    with ql.io.new_path(path) as new:
        new.write_text(text, "utf-8")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's threads from printing tracebacks of errors that are also raised."""
    from absl import logging

    logger, hook = logging.get_absl_logger(), sys.unraisablehook
    level = logger.level

    def quiet_hook(found: Any) -> None:
        # Writes that were under way when another one failed.
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    logger.setLevel("CRITICAL")
    sys.unraisablehook = quiet_hook
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
