"""TensorBoard, W&B and trackio, as loggers of a run."""

import contextlib
import contextvars
import dataclasses
import importlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .processes import all_or_none, is_first
from .run import Run
from .run_folder import LOG_ID, write_text

_PROJECT = "qlora-jax"
_NO_NUMBERS = ("step", "is_compiled")


@contextlib.contextmanager
def open_loggers(
    run: Run, after: int | None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that logs a step's numbers; `after` is the step to resume."""
    logs = []
    with contextlib.ExitStack() as stack:
        with all_or_none():
            for name in run.config.loggers if is_first() else ():
                opened = _tensorboard if name == "tensorboard" else _started
                logs.append(stack.enter_context(opened(name, run, after)))

        def watch(row: Mapping[str, Any]) -> None:
            is_number = lambda key: key not in _NO_NUMBERS and row[key] is not None
            for log in logs:
                log({key: row[key] for key in row if is_number(key)}, row["step"])

        yield watch


@contextlib.contextmanager
def _tensorboard(name: str, run: Run, after: int | None) -> Iterator[Any]:
    from tensorboardX import SummaryWriter

    purge = None if after is None else after + 1
    with SummaryWriter(str(run.folder / name), purge_step=purge) as writer:

        def log(numbers: Mapping[str, Any], step: int) -> None:
            for key, number in numbers.items():
                writer.add_scalar(key, number, step)

        yield log


@contextlib.contextmanager
def _started(name: str, run: Run, after: int | None) -> Iterator[Any]:
    """Gives the `log` of W&B or trackio; a resumed run goes on under its name."""
    path = run.folder / LOG_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    number = path.read_text("utf-8")
    settings: dict[str, Any] = dict(
        name=f"{run.folder.resolve().name}-{number}",
        config=dataclasses.asdict(run.config),
        resume="allow",
    )
    if name == "wandb":
        settings |= dict(id=number, dir=str(run.folder), reinit="create_new")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        try:
            start = importlib.import_module(name).init
            # Where a run is open, in its context, trackio ends it.
            one = contextvars.Context().run(start, project=_PROJECT, **settings)
        except Exception as error:  # each library has its own kinds
            raise ValueError(
                f"`log` must name what can start. {name}: {error}"
            ) from error
    try:
        yield one.log
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            one.finish()
