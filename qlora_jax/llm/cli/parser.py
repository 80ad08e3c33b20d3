"""The parser of the command line: the options, their help and their errors."""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml

from ... import __version__
from ..app import configs
from ..app.options import (
    REQUIRED,
    Config,
    Option,
    check_names,
    describe_type,
    options_of,
    suggest_option,
)
from ..app.run_folder import is_run
from ..app.train_config import TrainConfig
from ..printable import printable_lines

# The commands, which are functions in `qlora_jax.llm.app`, and their config classes.
COMMANDS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "score": configs.ScoreConfig,
    "export": configs.ExportConfig,
    "generate": configs.GenerateConfig,
    "check": configs.CheckConfig,
}
SHOW_ALL = "--help_all"
CACHE_HELP = """\
Compiled programs are cached in ~/.cache/qlora_jax, up to 1 GiB. Set QLORA_JAX_CACHE or
XDG_CACHE_HOME to move this cache, JAX_COMPILATION_CACHE_DIR to use a cache of your own,
or JAX_ENABLE_COMPILATION_CACHE=false to turn it off."""
EXAMPLES = """\
qlora-jax train --model HuggingFaceTB/SmolLM2-135M --data data.jsonl --out run
qlora-jax train --config run.yaml --learning-rate 1e-3
qlora-jax train --config run.yaml --preview 3
qlora-jax train --config run.yaml --resume
qlora-jax score --model HuggingFaceTB/SmolLM2-135M --data valid.jsonl
qlora-jax export --model base --adapter adapter --format merged --out merged
qlora-jax export --model base --format bitsandbytes --out base-4bit
qlora-jax export --run run
qlora-jax export --run run --for vllm --out served
qlora-jax generate --model HuggingFaceTB/SmolLM2-135M-Instruct
qlora-jax generate --model base --prompts prompts.jsonl --out answers.jsonl
qlora-jax check --json"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are short: without the usage, and with exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the error, and exits."""
        text = printable_lines(f"{self.prog}: {message}\nSee {self.prog} --help.")
        print(text, file=sys.stderr)
        raise SystemExit(2)


def make_parsers(show_all: bool = False) -> tuple[Parser, Mapping[str, Parser]]:
    """Returns the parser of the program, and those of its commands by name.

    With `show_all`, their help lists all options of `train`, and not only common ones.
    """
    formatter = argparse.RawDescriptionHelpFormatter  # keeps line breaks in the epilog
    settings: dict[str, Any] = dict(formatter_class=formatter, allow_abbrev=False)
    parser = Parser(
        prog="qlora-jax",
        description="QLoRA for JAX: train, run, score and export models.",
        epilog=CACHE_HELP,
        **settings,
    )
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(dest="command", title="subcommands")
    for name, config_type in COMMANDS.items():
        description = (config_type.__doc__ or "").partition("\n")[0]
        examples = [line for line in EXAMPLES.splitlines() if line.split()[1] == name]
        command = subparsers.add_parser(
            name,
            prog=f"qlora-jax {name}",
            help=description,
            description=description,
            epilog="\n  ".join(["examples:", *examples]) + f"\n\n{CACHE_HELP}",
            **settings,
        )
        _add_options(command, config_type, show_all)
    return parser, subparsers.choices


def _add_options(parser: Parser, config_type: type[Config], show_all: bool) -> None:
    options = options_of(config_type).values()
    required = [option.name for option in options if option.default is REQUIRED]
    usage = [f"--{x} {x.upper()}" for x in required]
    usage = [config_type.usage] if config_type.usage else usage
    parser.usage = " ".join([parser.prog, *usage, "[options]"])
    config_help = "YAML file of settings; flags override it"
    parser.add_argument("--config", action="append", default=[], help=config_help)
    parser.add_argument(
        "--print_config", action="store_true", help="print the settings, and exit"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    if common := config_type.common:
        parser.add_argument(SHOW_ALL, action="help", help="list all options, and exit")
    group: Any = parser
    for option in options:
        if option.section is not None:
            group = parser.add_argument_group(option.section)
        is_shown = show_all or not common or option.name in common
        _add_option(group, option, is_shown)


def _add_option(group: Any, option: Option, is_shown: bool) -> None:
    """Adds an option to the parser, in a section of `--help`.

    The parser keeps a value as text, for `Config.from_settings` to convert. An option
    that is not on the command line gets no value at all, not even its default.
    """
    metavar, notes = option.name.upper(), []
    members = get_args(option.hint)  # of a union or a `Literal`
    accepts_bool = bool in (option.hint, *members)
    if accepts_bool and {*members} <= {bool, type(None)}:
        metavar = "{true,false}"
    elif get_origin(option.hint) is Literal:
        metavar = f"{{{','.join(members)}}}"
    else:
        notes.append(describe_type(option.hint))
    if option.default is REQUIRED:
        notes.append("required")
    elif isinstance(default := option.default, bool | int | float | str):
        text = str(default).lower() if isinstance(default, bool) else default
        notes.append(f"default: {text}")
    settings: dict[str, Any] = dict(default=argparse.SUPPRESS, metavar=metavar)
    text = f"{option.help} ({'; '.join(notes)})" if notes else option.help
    settings["help"] = text if is_shown else argparse.SUPPRESS
    if accepts_bool:  # `--resume` is `--resume=true`
        settings |= dict(nargs="?", const="true")
    group.add_argument(f"--{option.name}", **settings)


def parse(arguments: Sequence[str]) -> tuple[str, Config, argparse.Namespace]:
    """Returns the command, its config, and the parsed arguments."""
    arguments = [_normalize_flag(x) for x in arguments]
    parser, commands = make_parsers(show_all=SHOW_ALL in arguments)
    namespace, unknown = parser.parse_known_args(arguments)
    if (name := namespace.command) is None:
        parser.error(f"the command must be one of {', '.join(COMMANDS)}. Got none.")
    if unknown:
        first = re.sub(r"^--|=.*", "", unknown[0])
        hint = suggest_option(first, options_of(COMMANDS[name]))
        commands[name].error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
    settings, options = {}, options_of(COMMANDS[name])
    try:
        for file in namespace.config:
            folder = pathlib.Path(file).parent
            # The file in a run's folder has the settings of `train`. For a command with
            # the option `run`, it stands for the run itself.
            if "run" in options and is_run(folder):
                settings["run"] = str(folder)
            else:
                settings |= _read_settings(file, COMMANDS[name])
        settings |= {k: x for k, x in vars(namespace).items() if k in options}
        config = COMMANDS[name].from_settings(settings)
        if isinstance(config, TrainConfig) and "out" not in namespace:
            _note_other_folder(config, namespace.config)
    except ValueError as error:
        commands[name].error(str(error))
    if namespace.print_config:
        print(yaml.safe_dump(config.to_settings(), sort_keys=False), end="")
        commands[name].exit()
    return name, config, namespace


def _normalize_flag(argument: str) -> str:
    """Returns a flag as the parser spells it: `--a-b=8` becomes `--a_b=8`."""
    flag, equals, value = argument.partition("=")
    if re.fullmatch(r"--[\w-]+", flag):
        flag = f"--{flag[2:].replace('-', '_')}"
    return f"{flag}{equals}{value}"


def _note_other_folder(config: TrainConfig, files: Sequence[str]) -> None:
    """Prints which run is resumed if it is not in the folder of a file of settings."""
    out = config.out
    folders = [os.path.realpath(os.path.dirname(file)) for file in files]
    if config.resume and os.path.realpath(out) not in folders:
        print(
            f"The run in {out!r} is resumed, as `out` in {files} says", file=sys.stderr
        )


class _UniqueKeyLoader(yaml.SafeLoader):
    """A loader that rejects repeated keys, of which PyYAML would keep only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        if len({*keys}) < len(keys):
            raise ValueError(f"Got {max(keys, key=keys.count)[1]!r} more than once.")
        return super().construct_mapping(node, deep)


def _read_settings(file: str, config_type: type[Config]) -> dict[str, object]:
    try:
        settings = yaml.load(pathlib.Path(file).read_bytes(), _UniqueKeyLoader)
        if not isinstance(settings, dict):
            raise ValueError(f"Got {settings!r}.")
        check_names(settings, options_of(config_type))
        return settings
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = "It is missing." if isinstance(error, FileNotFoundError) else error
        message = f"`config` must be a YAML file of settings. {file}: {reason}"
        raise ValueError(message) from error
