"""The command line `qlora-jax`.

Results go to stdout, progress and errors to stderr. The exit status is 0 if all went
well, 1 if the input is wrong, 2 if the command line is, 130 if it was interrupted, 141
if nobody reads the results on, as behind `| head`, and 143 if `train` was sent SIGTERM.
"""

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, get_args

from .. import __version__
from . import configs
from .huge_pages import with_huge_pages
from .train_config import TrainConfig
from .usage import as_typed, quiet_if_unread

PROGRAMS = """\
Compiled programs are kept for the next run in ~/.cache/qlora_jax (XDG_CACHE_HOME, or
QLORA_JAX_CACHE for this program alone), at most 1 GiB. JAX_COMPILATION_CACHE_DIR names
another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none."""


class _Command(NamedTuple):
    config: type
    positional: str | None
    examples: tuple[str, ...]
    streams: bool = False  # whether it writes its result in pieces


# What is wrong with the input, or happens to a run: one line, and no traceback.
ERRORS = (
    ArithmeticError,
    ImportError,
    NotImplementedError,
    OSError,
    TypeError,
    ValueError,
)
# The functions of the package, by name.
COMMANDS = {
    "train": _Command(
        TrainConfig,
        None,
        (
            "--model HuggingFaceTB/SmolLM2-135M --data data.jsonl --out run",
            "--config run.yaml --learning-rate 1e-3",
            "--config run.yaml --resume",
        ),
    ),
    "score": _Command(
        configs.ScoreConfig,
        None,
        (
            "--model HuggingFaceTB/SmolLM2-135M --data valid.jsonl",
            "--model base-4bit --adapter adapter --data valid.jsonl --json",
        ),
    ),
    "merge": _Command(
        configs.MergeConfig, None, ("--model base --adapter adapter --out merged",)
    ),
    "export": _Command(
        configs.ExportConfig,
        None,
        (
            "--model base --format bitsandbytes --out base-4bit",
            "--model base --adapter adapter --format gguf --out model.gguf",
            "--run run",
        ),
    ),
    "quantize": _Command(
        configs.QuantizeConfig,
        "model",
        ("base --out base-4bit", "base --out base-fp4 --fmt fp4"),
    ),
    "generate": _Command(
        configs.GenerateConfig,
        None,
        (
            "--model HuggingFaceTB/SmolLM2-135M-Instruct",
            "--model base --adapter adapter --prompt Hello --temperature 0.7",
        ),
        streams=True,
    ),
    "inspect": _Command(configs.InspectConfig, "path", ("adapter", "base-4bit --json")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit status.

    Args:
        arguments: Those behind the program's name; by default those of the process.

    Example:
        >>> import tempfile, numpy as np, qlora_jax as ql
        >>> path = tempfile.mkdtemp() + "/x.safetensors"
        >>> ql.io.write_safetensors(path, {"x": np.ones(3, np.float32)})
        >>> main(["inspect", path])
        safetensors
        leaf  shape  format   rank  bytes
        x     [3]    float32           12
        1 leaves, 12 bytes
        0
    """
    return _run(sys.argv[1:] if arguments is None else arguments, lambda config: None)


def process() -> None:
    """What the program `qlora-jax` runs: `main`, which may start the process again."""

    def prepare(config: Any) -> None:
        if getattr(config, "huge_pages", False):
            with_huge_pages(config.verbose)
        importlib.import_module(".programs", __package__).keep_programs()

    with quiet_if_unread():
        sys.exit(_run(sys.argv[1:], prepare))


def _run(given: Sequence[str], prepare: Callable[[Any], None]) -> int:
    """Runs a command line, once its config is known and `prepare` has seen it."""
    parser, commands = _parsers()
    found = parser.parse_args(_spelled(given))
    name = found.command
    settings = found[name]
    fields = {f.name for f in dataclasses.fields(COMMANDS[name].config)}
    try:
        chosen = {key: settings[key] for key in fields}
        config = COMMANDS[name].config(**chosen)
    except ValueError as error:
        commands[name].error(str(error))
    prepare(config)
    try:
        function = getattr(importlib.import_module("qlora_jax.cli"), name)
        if COMMANDS[name].streams and not settings.json:
            function(config, _write)
            return 0
        result = function(config)
        if getattr(config, "distributed", False):
            processes = importlib.import_module(".processes", __package__)
            if not processes.is_first():
                return 0
        text = _as_json(result) if settings.json else str(result)
    except KeyboardInterrupt:
        return 130
    except ERRORS as error:
        print(f"qlora-jax {name}: {error}", file=sys.stderr)
        return 1
    _write(text + "\n")
    return 0


def _write(text: str) -> None:
    with quiet_if_unread():
        print(text, end="")


def _as_json(result: Any) -> str:
    return json.dumps(dataclasses.asdict(result), allow_nan=False)


def _spelled(arguments: Sequence[str]) -> list[str]:
    """Spells flags as the parser has them; `--resume` alone is `--resume=true`."""
    switches = {
        f"--{field.name}"
        for command in COMMANDS.values()
        for field in dataclasses.fields(command.config)
        if bool in (field.type, *get_args(field.type))
    }
    spelled = [_with_underscores(x) for x in arguments]
    for i, argument in enumerate(spelled):
        following = spelled[i + 1 : i + 2]
        if argument in switches and not (following and following[0][:2] != "--"):
            spelled[i] += "=true"
    return spelled


def _with_underscores(argument: str) -> str:
    """Spells a flag as the settings are: `--batch-tokens=8` is `--batch_tokens=8`."""
    flag, equals, value = argument.partition("=")
    if not re.fullmatch(r"--[\w-]+", flag):
        return argument  # a value
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def _refuse_usage(message: str, name: str | None) -> NoReturn:
    """Says what is wrong with a command line, and exits with 2."""
    # The parser itself says "score.data" of what is missing in a command.
    found = re.search(rf"\b({'|'.join(COMMANDS)})\.\w", message)
    name = found[1] if name is None and found else name
    program = "qlora-jax" if name is None else f"qlora-jax {name}"
    if name is not None:
        command = COMMANDS[name]
        names = {field.name for field in dataclasses.fields(command.config)}
        flags = {*names, "config", "json"} - {command.positional}
        message = as_typed(message, name, flags, command.positional)
    print(f"{program}: {message}\nSee {program} --help.", file=sys.stderr)
    raise SystemExit(2)


def _parsers() -> tuple[Any, dict[str, Any]]:
    """Returns the parser, and those of the commands."""
    try:
        from jsonargparse import ArgumentParser, DefaultHelpFormatter
    except ImportError as error:
        raise SystemExit("qlora-jax needs: pip install 'qlora-jax[cli]'") from error

    class Formatter(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text  # examples keep their lines

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            prog = getattr(ex, "subcommand_parser", self).prog
            words = prog.replace("[options]", "").split()
            _refuse_usage(message, next((x for x in words if x in COMMANDS), None))

    parser = Parser(
        prog="qlora-jax",
        description="QLoRA for JAX: train, use, score, merge, export, inspect models.",
        version=__version__,
        epilog=PROGRAMS,
        formatter_class=Formatter,  # the commands' too
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {}
    for name, command in COMMANDS.items():
        description = (command.config.__doc__ or "").partition("\n")[0]
        lines = [f"  qlora-jax {name} {example}" for example in command.examples]
        one = Parser(
            description=description,
            epilog="\n".join(["examples:", *lines, "", PROGRAMS]),
        )
        one.add_argument(
            "--config", action="config", help="YAML file of settings; flags override it"
        )
        skip: set[str | int] = set()
        if command.positional is not None:
            skip = {command.positional}
            one.add_argument(
                command.positional, type=str, help="Path, or hub id of a model."
            )
        one.add_class_arguments(command.config, as_group=False, skip=skip)
        one.add_argument("--json", action="store_true", help="print the result as JSON")
        subcommands.add_subcommand(name, one, help=description)
        commands[name] = one
    return parser, commands


if __name__ == "__main__":
    process()
