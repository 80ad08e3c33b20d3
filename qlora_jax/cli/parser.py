"""The parser of the command line: options, their help, and errors about them."""

import argparse
import dataclasses
import itertools
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from .. import __version__
from . import configs
from .run_folder import is_run
from .train_config import SWEPT, TrainConfig

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
# The titles of groups of options in the help, by the first option of each.
GROUPS = {
    "train": {
        "model": "model and data",
        "lora_r": "adapters",
        "fmt": "number format of the base",
        "learning_rate": "training",
        "objective": "objective",
        "batch_size": "batches",
        "optimizer": "optimizer",
        "dtype": "computation and memory",
        "seed": "seeds",
        "eval_every": "evaluation",
        "save_every": "checkpoints and results",
        "train_on": "rows",
        "mesh": "devices and processes",
    },
    "score": {"model": "model and data", "dtype": "computation"},
    "export": {"model": "what to export", "fmt": "number formats", "data": "more"},
    "generate": {
        "model": "model and texts",
        "max_new_tokens": "sampling",
        "fmt": "number format of the base",
        "dtype": "computation",
    },
}
PROGRAMS = """\
Compiled programs are kept for the next run in ~/.cache/qlora_jax (XDG_CACHE_HOME, or
QLORA_JAX_CACHE for this program alone), at most 1 GiB. JAX_COMPILATION_CACHE_DIR names
another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none."""
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
_TYPES: dict[Any, str] = {int: "an integer", float: "a number", str: "text"}
_WRONG_VALUE = r"""Parser key "(\w+)".*(?:Got|Given) value: (.*)"""
_TYPES |= {bool: "true or false", list: "a list", dict: "a mapping"}


def spell(arguments: Sequence[str]) -> list[str]:
    """Returns flags as the parser spells them: `--a-b=8` is `--a_b=8`."""
    switches = {
        f"--{field.name}"
        for config in COMMANDS.values()
        for field in dataclasses.fields(config)
        if bool in (field.type, *get_args(field.type))
    }
    spelled = []
    arguments = _take_runs(arguments)
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


def _take_runs(arguments: Sequence[str]) -> list[str]:
    """Returns `--run R` for `--config R/config.yaml` where a command takes a run."""
    given = [[a] if a[:9] != "--config=" else ["--config", a[9:]] for a in arguments]
    flags = [flag for flags in given for flag in flags]
    for index, (flag, value) in enumerate(itertools.pairwise(flags)):
        path, command = pathlib.Path(value), COMMANDS.get(flags[0])
        has_run = "run" in getattr(command, "__dataclass_fields__", ())
        if flag == "--config" and has_run and is_run(path.parent):
            flags[index : index + 2] = ["--run", str(path.parent)]
    return flags


def make_parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Returns the parser of the program, and those of its commands by name."""
    parser = Parser(
        prog="qlora-jax",
        description="QLoRA for JAX: train, use, score, export, inspect models.",
        version=__version__,
        epilog=PROGRAMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the commands' too
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {}
    for name, config in COMMANDS.items():
        commands[name] = command = _make_command(name, config)
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, commands


def _make_command(name: str, config: Any) -> "Parser":
    """Returns the parser of a command, whose options are the fields of `config`."""
    examples = [x for x in EXAMPLES.splitlines() if x.split()[1] == name]
    fields = {field.name: field for field in dataclasses.fields(config)}
    unset = dataclasses.MISSING
    required = [x for x, f in fields.items() if f.default is f.default_factory is unset]
    is_positional = config is configs.InspectConfig
    usage = [x.upper() if is_positional else f"--{x} {x.upper()}" for x in required]
    parser = Parser(
        usage=" ".join(["qlora-jax", name, *usage, "[options]"]),
        description=(config.__doc__ or "").partition("\n")[0],
        epilog="\n  ".join(["examples:", *examples]) + f"\n\n{PROGRAMS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags override it"
    )
    parser.add_class_arguments(config, as_group=False, as_positional=is_positional)
    parser.types = get_type_hints(config)
    actions = {action.dest: action for action in parser._actions}
    group, options = None, parser._action_groups[1]
    for option, field in fields.items():
        action, values = actions[option], describe_type(parser.types[option])
        if title := GROUPS.get(name, {}).get(option):
            group = parser.add_argument_group(title)
        if group is not None:  # moves it there, in the help alone
            options._group_actions.remove(action)
            group._group_actions.append(action)
        if parser.types[option] is Any:
            values = f"{_TYPES[SWEPT[option]]}, or several with commas between them"
        action.metavar = str(action.metavar or "").replace(",null", "") or None
        about = [] if action.metavar else [values]  # which lists the choices
        about += ["required"] * (option in required)
        if isinstance(default := field.default, bool | int | float | str):
            text = str(default).lower() if isinstance(default, bool) else default
            about.append(f"default: {text}")
        action.help = f"{action.help} ({'; '.join(about)})" if about else action.help
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def describe_type(hint: Any) -> str:
    """Returns the values of a type in words, such as "an integer" or "a, b or c"."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [describe_type(part) for part in parts if part is not type(None)]
        return " or ".join(kinds)
    return _TYPES.get(get_origin(hint) or hint, "")


class Parser(ArgumentParser):
    """A parser whose errors name an option and what it takes."""

    types: dict[str, Any] = {}  # the types of the options, by name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error without the usage, and exits with status 2."""
        parser = getattr(ex, "subcommand_parser", self)
        prog = parser.prog.replace(" [options]", "")
        wrong = re.match(_WRONG_VALUE, message, re.S)
        option, value = wrong.groups() if wrong else ("", "")
        if option in parser.types:
            values = describe_type(parser.types[option])
            option = "for" if option == "server" else option
            message = f"`{option}` must be {values}. Got {value}."
        elif re.match('Parser key "config"|Problems parsing config|Unexp', message):
            what = message.partition('"config":')[2].strip() or message
            what = what.replace("File does not exist", "It is missing")
            message = f"`config` must be a YAML file of settings. {what}"
        elif missing := re.findall(r"(\w+)\.(\w+)", message.partition("required:")[2]):
            prog = f"{prog} {missing[0][0]}"
            names = " and ".join(f"`{option}`" for _, option in missing)
            message = f"{names} must be given."
        print(f"{prog}: {message}\nSee {prog} --help.", file=sys.stderr)
        raise SystemExit(2)
