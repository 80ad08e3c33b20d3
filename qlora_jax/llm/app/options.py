"""The options of the commands, which are the fields of the config classes.

`Config.from_settings` fills a config from flags, from a YAML file or from a dict.
"""

import dataclasses
import datetime
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ..models.suggestions import did_you_mean

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING  # the default of an option that must be given
_UNIONS = (Union, types.UnionType)
_TYPE_NAMES: dict[Any, str] = {int: "an integer", float: "a number", str: "text"}
_TYPE_NAMES |= {bool: "true or false", list: "a list", dict: "a mapping"}
# Names in PEFT, transformers and TRL that are too different from ours to be guessed.
_NAMES_ELSEWHERE = {
    "adam_beta2": "beta2",
    "alpha": "lora_alpha",
    "chat_template_path": "template",
    "dropout": "lora_dropout",
    "early_stopping_patience": "keep_best",
    "eval_steps": "eval_every",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "remat",
    "load_best_model_at_end": "keep_best",
    "lora_r": "rank",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_steps": "steps",
    "modules_to_save": "trainable",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "r": "rank",
    "resume_from_checkpoint": "resume",
    "report_to": "log",
    "save_steps": "save_every",
    "target_fmt": "merge_aware",
}


class Limit(NamedTuple):
    """The values that an option accepts, besides None."""

    description: str
    contains: Callable[[Any], bool]


COUNT = Limit("positive", lambda x: x >= 1)
POSITIVE = Limit("positive and finite", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Limit("at least 0", lambda x: 0 <= x < math.inf)
FRACTION = Limit("in [0, 1)", lambda x: 0 <= x < 1)
# `pathlib.Path("")` is the current folder.
PATH = Limit("a path", lambda x: x != "")
# `jax.random.key` drops the higher bits of a seed.
SEED = Limit("from 0 to 2**32 - 1", lambda x: 0 <= x < 1 << 32)


@dataclass(frozen=True)
class Option:
    """A field of a config."""

    field: str
    hint: Any  # the type annotation of the field
    default: Any
    help: str  # from the docstring of the config
    name: str  # in flags, files, error messages and the saved states of a run
    section: str | None = None  # of `--help`, for this option and the next ones
    limit: Limit | None = None
    may_change: bool = False  # whether a resumed run may have another value


def option(
    default: T,
    *,
    name: str | None = None,
    section: str | None = None,
    limit: Limit | None = None,
    may_change: bool = False,
) -> T:
    """Returns a field of a `Config`. A field with only a default needs no `option`.

    `name`, if it cannot be that of the field, and the others are as in `Option`. An
    option that may change must not affect the trained weights.
    """
    metadata: dict[str, Any] = dict(section=section, limit=limit, may_change=may_change)
    metadata |= {} if name is None else dict(name=name)
    if isinstance(default, dict | list):
        field: Any = dataclasses.field(default_factory=default.copy, metadata=metadata)
    else:
        field = dataclasses.field(default=default, metadata=metadata)
    return field


class Config:
    """Base of the config classes, which are frozen dataclasses of options."""

    # What `--help` shows as required; by default, the options without a default.
    usage: ClassVar[str] = ""
    # The options that `--help` lists, if `--help-all` lists more.
    common: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        for name, value in self.to_settings().items():
            limit = options_of(type(self))[name].limit
            values = value if isinstance(value, list) else [value]
            # None stands for a default that the data or the model decide.
            if limit and not all(x is None or limit.contains(x) for x in values):
                raise ValueError(
                    f"`{name}` must be {limit.description}. Got {value!r}."
                )

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Returns a config with settings from a file, from flags or from Python code.

        Args:
            settings: Values by the names of options. Strings are converted to the types
                of the options.

        Raises:
            ValueError: If a name is unknown, a value is wrong, or a required option is
                missing.
        """
        options = options_of(cls)
        check_names(settings, options)
        values = {
            options[name].field: _convert_option(options[name], value)
            for name, value in settings.items()
        }
        required = [x.name for x in options.values() if x.default is REQUIRED]
        if missing := [f"`{name}`" for name in required if name not in settings]:
            raise ValueError(f"{' and '.join(missing)} must be given.")
        return cls(**values)

    def to_settings(self) -> dict[str, Any]:
        """Returns the value of each option, by its name."""
        options = options_of(type(self))
        return {name: getattr(self, option.field) for name, option in options.items()}

    def replace(self, **options: Any) -> Self:
        """Returns a config with other values for some options.

        Args:
            **options: Values by the names of fields.
        """
        return dataclasses.replace(cast(Any, self), **options)


def check_names(settings: Mapping[str, object], options: Mapping[str, Option]) -> None:
    """Raises ValueError if a name is not that of an option."""
    if unknown := [name for name in settings if name not in options]:
        hint = suggest_option(unknown[0], options)
        # The settings of a run of an earlier version have several unknown names.
        names = {x: _NAMES_ELSEWHERE[x] for x in unknown if x in _NAMES_ELSEWHERE}
        if len(unknown) > 1 and names:
            pairs = (f"`{new}` instead of `{old}`" for old, new in names.items())
            hint = (
                f" Write {', '.join(pairs)}, and delete the others. docs/limits.md "
                "says what replaces them."
            )
        raise ValueError(
            f"`settings` must be options of the command. Got {unknown}.{hint}"
        )


def suggest_option(name: str, options: Mapping[str, Option]) -> str:
    """Returns " Did you mean `x`?" for an unknown option, if one is similar."""
    elsewhere = _NAMES_ELSEWHERE.get(name)
    if elsewhere in options:
        return f" Did you mean `{elsewhere}`?"
    return did_you_mean(name, options)


@functools.cache
def options_of(config_type: type[Config]) -> Mapping[str, Option]:
    """Returns the options of a config by name."""
    hints, options = get_type_hints(config_type), {}
    for field in dataclasses.fields(cast(Any, config_type)):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        settings = {"name": field.name, **field.metadata}
        text = _read_help(config_type, field.name)
        option = Option(field.name, hints[field.name], default, text, **settings)
        options[option.name] = option
    return options


def _read_help(config_type: type, field: str) -> str:
    """Returns the text for a field in the docstring of its class."""
    for cls in config_type.__mro__:
        pattern = rf"^ {{4}}{field}: (.*(?:\n {{8}}.*)*)"
        if text := re.search(pattern, inspect.getdoc(cls) or "", re.M):
            return " ".join(text[1].split())
    return ""


def _convert_option(option: Option, value: object) -> Any:
    try:
        return convert(option.hint, value)
    except ValueError:
        expected = describe_type(option.hint)
        message = f"`{option.name}` must be {expected}. Got {value}."
        raise ValueError(message) from None


def convert(hint: Any, value: Any) -> Any:
    """Converts a value to the type `hint`, for example text from a flag.

    Raises ValueError if the value does not have this type and cannot be converted.
    """
    kind, type_args = get_origin(hint) or hint, get_args(hint)
    if kind in _UNIONS:
        # Most values are also valid as text, so the other types are tried first.
        for member in sorted(type_args, key=lambda member: member is str):
            with suppress(ValueError):
                return convert(member, value)
    elif kind is Literal and value in type_args:
        return value
    elif kind is types.NoneType and value in (None, "null"):
        return None
    elif kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
    elif kind in (int, float):
        # Convert through text, because int("1.5") fails, but int(1.5) is 1.
        return kind(str(value))
    elif kind in (list, dict):
        return _convert_items(kind, type_args, value)
    elif kind is str and isinstance(value, str | int | float | datetime.date):
        if not isinstance(value, bool):
            return str(value)
    raise ValueError


def _convert_items(kind: type, type_args: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, str) and value[:1] == ("[" if kind is list else "{"):
        import yaml

        with suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    elif isinstance(value, str) and kind is list and type_args[0] is not str:
        # Lists of texts are split where they are used, since paths may contain commas.
        value = value.split(",")
    if kind is list and isinstance(value, list | tuple):
        return [convert(type_args[0], item) for item in value]
    if kind is dict and isinstance(value, Mapping):
        return {
            convert(type_args[0], k): convert(type_args[1], x) for k, x in value.items()
        }
    raise ValueError


def describe_type(hint: object) -> str:
    """Returns a type in words, such as "an integer", or its values: "a, b or c"."""
    type_args = get_args(hint)
    if get_origin(hint) is Literal:
        *first, last = type_args
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(hint) in _UNIONS:
        return " or ".join(describe_type(x) for x in type_args if x is not type(None))
    return _TYPE_NAMES.get(get_origin(hint) or hint, "")
