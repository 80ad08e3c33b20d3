"""The command line `qlora-jax`.

Results go to stdout, progress and errors to stderr. Exit status: 0 success, 1 an error
(or a wrong result in `check`), 2 wrong command line, 130 interrupt, 141 stdout closed
(`| head`), 143 SIGTERM.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def _explain_missing_library() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"qlora-jax needs: pip install 'qlora-jax[train]'. {error}"
        ) from error


with _explain_missing_library():
    from .. import app
    from ..app import environment
    from ..printable import printable_lines
    from .parser import parse

# These errors are printed without a traceback, because their usual cause is the input,
# the machine or the training itself, and not a bug.
ERRORS = ArithmeticError, ImportError, NotImplementedError, OSError
ERRORS += TypeError, ValueError


def main(arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit status. Keeps the settings of the process."""
    return _run(arguments, lambda: None)


def run_program() -> None:
    """Runs the command in `sys.argv`, after changing this process's settings for it."""
    environment.shorten_warnings()
    with _exit_if_stdout_closed():
        sys.exit(_run(sys.argv[1:], environment.enable_compilation_cache))


def _run(arguments: Sequence[str], prepare: Callable[[], None]) -> int:
    """Runs a command after calling `prepare`; returns the exit status."""
    with _explain_missing_library():
        name, config, namespace = parse(arguments)
        function = getattr(app, name)
    prepare()
    try:
        if name == "generate" and not namespace.json:
            function(config, _write_answer)  # prints answers as they are generated
            return 0
        result = function(config)
        train_config = config if isinstance(config, app.TrainConfig) else None
        if train_config and train_config.distributed:
            from ..app.processes import is_first

            if not is_first():
                return 0  # the first process prints the result
        # A preview has escaped the text of its rows, and may add colors.
        is_safe = train_config is not None and train_config.preview is not None
        text = str(result) if is_safe else printable_lines(result)
        if namespace.json:
            text = json.dumps(dataclasses.asdict(result), allow_nan=False)
    except (*ERRORS, MemoryError, RuntimeError) as error:
        # If a device is out of memory, JAX raises a RuntimeError with this status.
        is_device_full = "RESOURCE_EXHAUSTED" in str(error)
        if not (is_device_full or isinstance(error, (MemoryError, *ERRORS))):
            raise
        reason = "the device is out of memory. " if is_device_full else ""
        reason = "no memory is left. " if isinstance(error, MemoryError) else reason
        text = printable_lines(f"qlora-jax {name}: {reason}{error}")
        print(text, file=sys.stderr)
        return 1
    _write(text + "\n")
    return int(getattr(result, "is_wrong", False))


def _write_answer(text: str) -> None:
    # Files and other programs get exactly what the model has written.
    _write(printable_lines(text) if sys.stdout.isatty() else text)


def _write(text: str) -> None:
    with _exit_if_stdout_closed():
        print(text, end="")


@contextlib.contextmanager
def _exit_if_stdout_closed() -> Iterator[None]:
    """Exits quietly if nothing reads the output any more, as after `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # the usual status after SIGPIPE
