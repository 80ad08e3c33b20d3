"""Checks the settings of a PEFT adapter, which may come from a file."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from .module_patterns import key_regex, layer_regex


def _is_whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and low <= value < 2**31


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value < high


def _is_tuple_of(check: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, tuple) and all(map(check, value))


def _is_dict_of(check: Callable[[Any], bool], value: Any) -> bool:
    is_dict = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    return is_dict and all(map(check, value.values()))


_is_layer = lambda value: _is_whole(value, 0)
_is_alpha = lambda value: _is_number(value, 1e-9, 1e9)
_is_names = lambda value: _is_tuple_of(lambda x: isinstance(x, str) and x != "", value)
_is_modules = lambda value: isinstance(value, str) or _is_names(value)
_MODULES = (_is_modules, "a list of names or a regular expression")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_whole, "a positive integer"),
    "lora_alpha": (_is_alpha, "a positive number"),
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "lora_dropout": (lambda v: _is_number(v, 0, 1), "in [0, 1)"),
    "bias": (
        lambda v: v in ("none", "all", "lora_only"),
        '"none", "all" or "lora_only"',
    ),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "modules_to_save": (_is_names, "a list of names"),
    "layers_to_transform": (
        lambda v: v is None or _is_layer(v) or _is_tuple_of(_is_layer, v),
        "a layer's number or a list of such",
    ),
    "layers_pattern": (_is_modules, "a name or a list of names"),
    "rank_pattern": (
        lambda v: _is_dict_of(_is_whole, v),
        "positive integers by name",
    ),
    "alpha_pattern": (
        lambda v: _is_dict_of(_is_alpha, v),
        "positive numbers by name",
    ),
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
    """Returns which settings are no valid regular expressions."""
    named = [
        *(("rank_pattern", key_regex(key)) for key in config.rank_pattern),
        *(("alpha_pattern", key_regex(key)) for key in config.alpha_pattern),
        *(("layers_pattern", layer_regex(key)) for key in config.layer_prefixes),
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
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(
                f"`{name}` must be a regular expression. Got {pattern!r}: {error}."
            )
    return problems
