"""Checks the settings of a PEFT adapter, which come from a file."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...trees.paths import refuse_listed
from ..files import CheckpointError
from .module_patterns import check_regex

_LISTED, _WIDTH = 60, 320  # lines of an error and their length: files can be hostile


def refuse(title: str, problems: Iterable[str]) -> None:
    """Raises CheckpointError with a file's problems under a title, if it has any."""
    lines = [line[:_WIDTH] for line in dict.fromkeys(problems)]
    more = len(lines) - _LISTED
    rest = [f"and {more} more"] if more > 0 else []
    refuse_listed(title, lines[:_LISTED] + rest, CheckpointError)


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(x, str) and x for x in value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_patterns(check: Any) -> Any:
    return lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(key, str) and check(x) for key, x in value.items())
    )


def _is_layers(value: Any) -> bool:
    is_layer = lambda x: type(x) is int and 0 <= x < 2**31
    is_several = isinstance(value, tuple) and all(map(is_layer, value))
    return value is None or is_layer(value) or is_several


_is_alpha = lambda value: _is_number(value) and 1e-9 < value < 1e9
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_count, "a positive integer"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "target_modules": (
        lambda v: isinstance(v, str) or _is_names(v),
        "a list of names or a regular expression",
    ),
    "exclude_modules": (
        lambda v: isinstance(v, str) or _is_names(v),
        "a list of names or a regular expression",
    ),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "in [0, 1)"),
    "bias": (
        lambda v: v in ("none", "all", "lora_only"),
        '"none", "all" or "lora_only"',
    ),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (_is_layers, "a layer's number or a list of such"),
    "layers_pattern": (
        lambda v: isinstance(v, str) or _is_names(v),
        "a name or a list of names",
    ),
    "rank_pattern": (_is_patterns(_is_count), "positive integers by name"),
    "alpha_pattern": (_is_patterns(_is_alpha), "positive numbers by name"),
}


def problems_of(config: Any) -> list[str]:
    """Returns what is wrong with the settings of a `PeftConfig`."""
    problems = []
    for name, (check, wanted) in _CHECKS.items():
        value = getattr(config, name)
        if not check(value):
            problems.append(f"`{name}` must be {wanted}. Got {value!r:.80}.")
    return problems or _regex_problems(config)


def _regex_problems(config: Any) -> list[str]:
    """Says which settings are regular expressions that cannot be used."""
    named = [
        *(("rank_pattern", key) for key in config.rank_pattern),
        *(("alpha_pattern", key) for key in config.alpha_pattern),
        *(("layers_pattern", key) for key in config.layer_prefixes),
    ]
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value.lower() != "all-linear":
            named.append((name, value))
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform is not None or config.layers_pattern
    ):
        return ["`layers_to_transform` must be left out where targets are a regex."]
    problems = []
    for name, pattern in named:
        try:
            check_regex(pattern)
        except ValueError as error:
            problems.append(f"`{name}`: {error}")
    return problems
