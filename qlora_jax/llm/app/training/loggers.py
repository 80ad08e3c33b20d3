"""Logs the metrics of each step to TensorBoard, W&B and trackio."""

import contextlib
import importlib
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..processes import all_or_none, is_first
from ..run_folder import LOG_ID, write_text
from .run import Run

_PROJECT = "qlora-jax"
_NOT_LOGGED = ("step", "is_compiled")

LogRow = Callable[[Mapping[str, Any]], object]  # takes a row of metrics.jsonl
LogStep = Callable[[Mapping[str, Any], int], object]  # takes metrics and their step


@contextlib.contextmanager
def open_loggers(run: Run, resume_after: int | None) -> Iterator[LogRow]:
    """Yields a function that logs the metrics of a step, in the first process only."""
    names = run.config.loggers if is_first() else []
    log_functions: list[LogStep] = []
    with contextlib.ExitStack() as stack:
        with all_or_none():
            for name in names:
                is_tensorboard = name == "tensorboard"
                open_logger = _open_tensorboard if is_tensorboard else _open_wandb_like
                log_step = stack.enter_context(open_logger(name, run, resume_after))
                log_functions.append(log_step)

        def log_row(row: Mapping[str, Any]) -> None:
            metrics = {k: x for k, x in row.items() if k not in _NOT_LOGGED}
            metrics = {k: x for k, x in metrics.items() if x is not None}
            for log_step in log_functions:
                log_step(metrics, row["step"])

        yield log_row


@contextlib.contextmanager
def _open_tensorboard(
    name: str, run: Run, resume_after: int | None
) -> Iterator[LogStep]:
    from tensorboardX import SummaryWriter

    # Steps that a resumed run computes again are dropped from the earlier log.
    purge_step = None if resume_after is None else resume_after + 1
    with SummaryWriter(str(run.folder / name), purge_step=purge_step) as writer:

        def log_step(metrics: Mapping[str, Any], step: int) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)

        yield log_step


@contextlib.contextmanager
def _open_wandb_like(
    name: str, run: Run, resume_after: int | None
) -> Iterator[LogStep]:
    """Opens W&B or trackio, which share an interface."""
    del resume_after  # both continue a run that has the same name
    path = run.folder / LOG_ID
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    log_id = path.read_text("utf-8")
    settings: dict[str, Any] = dict(
        name=f"{run.folder.resolve().name}-{log_id}",
        config=run.config.to_settings(),
        resume="allow",
    )
    if name == "wandb":
        settings |= dict(id=log_id, dir=str(run.folder), reinit="create_new")
    # Both print on stdout, which is reserved for the result of the command.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            init = importlib.import_module(name).init
            logger = init(project=_PROJECT, **settings)
        except Exception as error:  # each library has its own exceptions
            raise ValueError(
                f"`log` must name loggers that can start. {name}: {error}"
            ) from error
    try:
        yield logger.log
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            logger.finish()
