"""The command line `qlora-jax`.

Results go to stdout, progress and errors to stderr. Exit status: 0 success, 1 wrong
input, 2 wrong command line, 130 interrupt, 141 stdout closed (`| head`), 143 SIGTERM.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_args

from .. import __version__
from . import configs
from .huge_pages import with_huge_pages
from .train_config import TrainConfig

PROGRAMS = """\
Compiled programs are kept for the next run in ~/.cache/qlora_jax (XDG_CACHE_HOME, or
QLORA_JAX_CACHE for this program alone), at most 1 GiB. JAX_COMPILATION_CACHE_DIR names
another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none."""


# What is wrong with the input, or happens to a run: one line, and no traceback.
ERRORS = ArithmeticError, ImportError, NotImplementedError, OSError
ERRORS += TypeError, ValueError
# The functions of the package by name, with their settings.
COMMANDS: dict[str, Any] = {
    "train": TrainConfig,
    "score": configs.ScoreConfig,
    "export": configs.ExportConfig,
    "generate": configs.GenerateConfig,
    "inspect": configs.InspectConfig,
    "pairs": configs.PairsConfig,
    "check": configs.CheckConfig,
}
EXAMPLES = """\
qlora-jax train --model HuggingFaceTB/SmolLM2-135M --data data.jsonl --out run
qlora-jax train --config run.yaml --learning-rate 1e-3
qlora-jax train --config run.yaml --preview 3
qlora-jax train --config run.yaml --resume
qlora-jax score --model HuggingFaceTB/SmolLM2-135M --data valid.jsonl
qlora-jax score --model base-4bit --adapter adapter --data valid.jsonl --json
qlora-jax export --model base --adapter adapter --format merged --out merged
qlora-jax export --model base --format bitsandbytes --out base-4bit
qlora-jax export --model base --adapter adapter --format gguf --out model.gguf
qlora-jax export --run run
qlora-jax export --run run --for vllm --out served
qlora-jax pairs --model base --adapter adapter
qlora-jax generate --model HuggingFaceTB/SmolLM2-135M-Instruct
qlora-jax generate --model base --adapter adapter --prompt Hello --temperature 0.7
qlora-jax generate --model base --prompts prompts.jsonl --out answers.jsonl
qlora-jax inspect adapter
qlora-jax inspect base-4bit --json
qlora-jax check --out report.json"""
_UNREAD = 128 + 13  # what shells show for a program that SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's, and returns the exit status."""
    return _run(sys.argv[1:] if arguments is None else arguments, lambda config: None)


def process() -> None:
    """Runs the program `qlora-jax`: `main`, perhaps after a restart of the process."""

    def prepare(config: Any) -> None:
        if getattr(config, "huge_pages", False):
            with_huge_pages(config.verbose)
        importlib.import_module(".programs", __package__).keep_programs()

    with _quiet_if_unread():
        sys.exit(_run(sys.argv[1:], prepare))


def _run(given: Sequence[str], prepare: Callable[[Any], None]) -> int:
    """Runs a command line, and calls `prepare` with its config before the command."""
    parser, commands = _parsers()
    found = parser.parse_args(_spelled(given))
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
        return 130
    except ERRORS as error:
        print(f"qlora-jax {name}: {error}", file=sys.stderr)
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


def _spelled(arguments: Sequence[str]) -> list[str]:
    """Returns flags as the parser spells them: `--a-b=8` is `--a_b=8`."""
    switches = {
        f"--{field.name}"
        for config in COMMANDS.values()
        for field in dataclasses.fields(config)
        if bool in (field.type, *get_args(field.type))
    }
    spelled = []
    for index, argument in enumerate(arguments):
        following = [*arguments, "--"][index + 1]
        flag, equals, value = argument.partition("=")
        if re.fullmatch(r"--[\w-]+", flag):  # and no value
            flag = f"--{flag[2:].replace('-', '_')}"
            flag = "--server" if flag == "--for" else flag  # a word of Python's
            if flag in switches and not equals and following.startswith("--"):
                equals, value = "=", "true"
        spelled.append(f"{flag}{equals}{value}")
    return spelled


def _parsers() -> tuple[Any, dict[str, Any]]:
    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ImportError as error:
        raise SystemExit("qlora-jax needs: pip install 'qlora-jax[cli]'") from error

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text  # examples keep their lines

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            """Prints the error without the usage, which has a line for each flag."""
            prog = getattr(ex, "subcommand_parser", self).prog
            prog = prog.replace(" [options]", "")
            print(f"{prog}: {message}\nSee {prog} --help.", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(
        prog="qlora-jax",
        description="QLoRA for JAX: train, use, score, export, inspect models.",
        version=__version__,
        epilog=PROGRAMS,
        formatter_class=Formatter,  # the commands' too
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {}
    for name, config in COMMANDS.items():
        description = (config.__doc__ or "").partition("\n")[0]
        examples = [x for x in EXAMPLES.splitlines() if x.split()[1] == name]
        epilog = "\n  ".join(["examples:", *examples]) + f"\n\n{PROGRAMS}"
        commands[name] = one = Parser(description=description, epilog=epilog)
        one.add_argument(
            "--config", action="config", help="YAML file of settings; flags override it"
        )
        is_positional = config is configs.InspectConfig
        one.add_class_arguments(config, as_group=False, as_positional=is_positional)
        one.add_argument("--json", action="store_true", help="print the result as JSON")
        subcommands.add_subcommand(name, one, help=description)
    return parser, commands


if __name__ == "__main__":
    process()
