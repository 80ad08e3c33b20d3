"""The parser of the command line: the options, their help and their errors."""

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

from ... import __version__
from ..app import configs
from ..app.run_folder import is_run
from ..app.train_config import SWEPT, TrainConfig

# The commands, which are functions in `qlora_jax.llm.app`, and their config classes.
COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "score": configs.ScoreConfig,
    "export": configs.ExportConfig,
    "generate": configs.GenerateConfig,
    "inspect": configs.InspectConfig,
    "pairs": configs.PairsConfig,
    "check": configs.CheckConfig,
}
# Groups of options in the help of each command: first option -> title of the group.
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
    "export": {"model": "what to export", "fmt": "number formats", "data": "other"},
    "generate": {
        "model": "model and prompts",
        "max_new_tokens": "sampling",
        "fmt": "number format of the base",
        "dtype": "computation",
    },
}
PROGRAMS = """\
Compiled programs are cached in ~/.cache/qlora_jax, up to 1 GiB. Set QLORA_JAX_CACHE or
XDG_CACHE_HOME to move this cache, JAX_COMPILATION_CACHE_DIR to use a cache of your own,
or JAX_ENABLE_COMPILATION_CACHE=false to turn it off."""
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
_TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "text"}
_TYPE_NAMES |= {bool: "true or false", list: "a list", dict: "a mapping"}
_WRONG_VALUE = r"""Parser key "(\w+)".*(?:Got|Given) value: (.*)"""


def normalize_flags(arguments: Sequence[str]) -> list[str]:
    """Returns flags as the parser spells them: `--a-b=8` becomes `--a_b=8`."""
    switches = {
        f"--{field.name}"
        for config_type in COMMANDS.values()
        for field in dataclasses.fields(config_type)
        if bool in (field.type, *get_args(field.type))
    }
    normalized = []
    arguments = _replace_run_configs(arguments)
    for argument, following in itertools.pairwise([*arguments, "--"]):
        flag, equals, value = argument.partition("=")
        if re.fullmatch(r"--[\w-]+", flag):
            flag = f"--{flag[2:].replace('-', '_')}"
            # `for` is a keyword of Python, which cannot be a field of a dataclass.
            flag = "--server" if flag == "--for" else flag
            # A switch may stand alone: `--resume` is `--resume=true`.
            if flag in switches and not equals and following.startswith("--"):
                equals, value = "=", "true"
        normalized.append(f"{flag}{equals}{value}")
    return normalized


def _replace_run_configs(arguments: Sequence[str]) -> list[str]:
    """Turns `--config RUN/config.yaml` into `--run RUN` if a command has that option.

    That file has the settings of `train`, which the other commands do not accept.
    """
    prefix, parts = "--config=", []
    for argument in arguments:
        is_config = argument.startswith(prefix)
        parts += ["--config", argument[len(prefix) :]] if is_config else [argument]
    takes_run = bool(parts) and hasattr(COMMANDS.get(parts[0]), "run")
    for index, (flag, value) in enumerate(itertools.pairwise(parts)):
        folder = pathlib.Path(value).parent
        if flag == "--config" and takes_run and is_run(folder):
            parts[index : index + 2] = ["--run", str(folder)]
    return parts


def make_parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Returns the parser of the program, and those of its commands by name."""
    parser = Parser(
        prog="qlora-jax",
        description="QLoRA for JAX: train, run, score, export and inspect models.",
        version=__version__,
        epilog=PROGRAMS,
        # Keeps the line breaks of the epilog.
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = parser.add_subcommands(dest="command")
    commands = {}
    for name, config_type in COMMANDS.items():
        commands[name] = command = _make_command(name, config_type)
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, commands


def _make_command(name: str, config_type: type) -> "Parser":
    """Returns the parser of a command, whose options are the fields of its config."""
    examples = [line for line in EXAMPLES.splitlines() if line.split()[1] == name]
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    unset = dataclasses.MISSING
    required = [x for x, f in fields.items() if f.default is f.default_factory is unset]
    is_positional = config_type is configs.InspectConfig  # `qlora-jax inspect PATH`
    usage = [x.upper() if is_positional else f"--{x} {x.upper()}" for x in required]
    parser = Parser(
        usage=" ".join(["qlora-jax", name, *usage, "[options]"]),
        description=(config_type.__doc__ or "").partition("\n")[0],
        epilog="\n  ".join(["examples:", *examples]) + f"\n\n{PROGRAMS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags override it"
    )
    parser.add_class_arguments(config_type, as_group=False, as_positional=is_positional)
    parser.types = get_type_hints(config_type)  # for error messages
    actions = {action.dest: action for action in parser._actions}
    group, options = None, parser._action_groups[1]  # 0 has positional arguments
    for option, field in fields.items():
        action = actions[option]
        if title := GROUPS.get(name, {}).get(option):
            group = parser.add_argument_group(title)
        if group is not None:  # groups only affect the help
            options._group_actions.remove(action)
            group._group_actions.append(action)
        # jsonargparse lists the choices of a `Literal`, and null for None.
        action.metavar = str(action.metavar or "").replace(",null", "") or None
        notes = []
        if action.metavar is None:  # otherwise it lists the choices
            notes.append(_describe_option(option, parser.types[option]))
        if option in required:
            notes.append("required")
        if isinstance(default := field.default, bool | int | float | str):
            text = str(default).lower() if isinstance(default, bool) else default
            notes.append(f"default: {text}")
        action.help = f"{action.help} ({'; '.join(notes)})" if notes else action.help
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _describe_option(option: str, hint: object) -> str:
    if hint is Any:  # an option that may have several values, for a sweep
        return f"{_TYPE_NAMES[SWEPT[option]]}, or several separated by commas"
    return describe_type(hint)


def describe_type(hint: object) -> str:
    """Returns the values of a type in words, such as "an integer" or "a, b or c"."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(x) for x in parts if x is not type(None))
    return _TYPE_NAMES.get(get_origin(hint) or hint, "")


class Parser(ArgumentParser):
    """A parser whose errors name an option and the values that it accepts."""

    types: dict[str, Any] = {}  # the types of the options, by name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the error without the usage, and exits with status 2."""
        # jsonargparse reports the errors of a command through the program's parser.
        parser = getattr(ex, "subcommand_parser", self)
        prog = parser.prog.replace(" [options]", "")
        wrong_value = re.match(_WRONG_VALUE, message, re.S)
        option, value = wrong_value.groups() if wrong_value else ("", "")
        if option in parser.types:
            values = describe_type(parser.types[option])
            option = "for" if option == "server" else option  # see normalize_flags
            message = f"`{option}` must be {values}. Got {value}."
        elif re.match('Parser key "config"|Problems parsing config|Unexp', message):
            reason = message.partition('"config":')[2].strip() or message
            reason = reason.replace("File does not exist", "It is missing")
            message = f"`config` must be a YAML file of settings. {reason}"
        elif missing := re.findall(r"(\w+)\.(\w+)", message.partition("required:")[2]):
            prog = f"{prog} {missing[0][0]}"
            names = " and ".join(f"`{option}`" for _, option in missing)
            message = f"{names} must be given."
        print(f"{prog}: {message}\nSee {prog} --help.", file=sys.stderr)
        raise SystemExit(2)
