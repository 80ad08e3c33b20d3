"""The command line `qlora-jax`.

Results go to stdout, progress and errors to stderr. Exit status: 0 success, 1 wrong
input, 2 wrong command line, 130 interrupt, 141 stdout closed (`| head`), 143 SIGTERM.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import configs
from .environment import restart_with_huge_pages

# What is wrong with the input, or happens to a run: one line, and no traceback.
ERRORS = ArithmeticError, ImportError, NotImplementedError, OSError
ERRORS += TypeError, ValueError
_UNREAD = 128 + 13  # what shells show for a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's, and returns the exit status."""
    return _run(sys.argv[1:] if arguments is None else arguments, lambda config: None)


def process() -> None:
    """Runs the program `qlora-jax`: `main`, perhaps after a restart of the process."""

    def prepare(config: Any) -> None:
        if getattr(config, "huge_pages", False):
            restart_with_huge_pages(config.verbose)
        importlib.import_module(".environment", __package__).enable_compilation_cache()

    with _quiet_if_unread():
        sys.exit(_run(sys.argv[1:], prepare))


def _run(given: Sequence[str], prepare: Callable[[Any], None]) -> int:
    """Runs a command line, and calls `prepare` with its config before the command."""
    try:
        from .parser import COMMANDS, make_parsers, spell
    except ImportError as error:
        raise SystemExit("qlora-jax needs: pip install 'qlora-jax[cli]'") from error
    parser, commands = make_parsers()
    found = parser.parse_args(spell(given))
    name, settings = found.command, found[found.command]
    kind = COMMANDS[name]
    try:
        names = [field.name for field in dataclasses.fields(kind)]
        config = kind(**{name: settings[name] for name in names})
    except ValueError as error:
        commands[name].error(str(error))
    prepare(config)
    try:
        function = getattr(importlib.import_module("qlora_jax.cli"), name)
        if kind is configs.GenerateConfig and not settings.json:
            function(config, _write)
            return 0
        result = function(config)
        if getattr(config, "distributed", False):
            processes = importlib.import_module(".processes", __package__)
            if not processes.is_first():
                return 0
        as_json = lambda x: json.dumps(dataclasses.asdict(x), allow_nan=False)
        text = as_json(result) if settings.json else str(result)
    except KeyboardInterrupt:
        if name != "train":  # which has said where the state is
            print("qlora-jax: interrupted", file=sys.stderr)
        return 130
    except (*ERRORS, MemoryError, RuntimeError) as error:
        # JAX has no class for this error alone.
        is_full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not (is_full or isinstance(error, ERRORS)):
            raise
        why = "the device is out of memory. " * is_full
        print(f"qlora-jax {name}: {why}{error}", file=sys.stderr)
        return 1
    _write(text + "\n")
    return int(getattr(result, "is_wrong", False))


def _write(text: str) -> None:
    with _quiet_if_unread():
        print(text, end="")


@contextlib.contextmanager
def _quiet_if_unread() -> Iterator[None]:
    """Exits quietly if nothing reads the output any more, as after `| head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_UNREAD) from None


if __name__ == "__main__":
    process()
