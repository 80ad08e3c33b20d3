"""Checks the settings of a PEFT adapter, which may come from a file."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .module_patterns import key_regex, layer_regex

_BIASES = ("none", "all", "lora_only")


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
_is_bool = lambda value: isinstance(value, bool)
_is_names = lambda value: _is_tuple_of(lambda x: isinstance(x, str) and x != "", value)
_is_modules = lambda value: isinstance(value, str) or _is_names(value)
_is_layers = lambda x: x is None or _is_layer(x) or _is_tuple_of(_is_layer, x)
_is_rows = lambda x: (
    isinstance(x, list | tuple) and all(map(_is_layer, x)) and len({*x}) == len(x) > 0
)
_is_tokens = lambda x: x is None or _is_rows(x) or _is_dict_of(_is_rows, x)
# Settings, their check, and what they must be.
_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("r", _is_whole, "a positive integer"),
    ("lora_alpha", _is_alpha, "a positive number"),
    ("target_modules", _is_modules, "a list of names or a regular expression"),
    ("target_parameters", _is_names, "a list of names"),
    ("exclude_modules", _is_modules, "a list of names or a regular expression"),
    ("lora_dropout", lambda value: _is_number(value, 0, 1), "in [0, 1)"),
    ("bias", lambda value: value in _BIASES, '"none", "all" or "lora_only"'),
    ("use_rslora", _is_bool, "true or false"),
    ("use_dora", _is_bool, "true or false"),
    ("modules_to_save", _is_names, "a list of names"),
    ("trainable_token_indices", _is_tokens, "numbers of tokens, each once"),
    ("layers_to_transform", _is_layers, "a layer's number or a list of such"),
    ("layers_pattern", _is_modules, "a name or a list of names"),
    ("rank_pattern", partial(_is_dict_of, _is_whole), "positive integers by name"),
    ("alpha_pattern", partial(_is_dict_of, _is_alpha), "positive numbers by name"),
)


def problems_of(config: Any) -> list[str]:
    """Returns what is wrong with the settings of a `PeftConfig`."""
    problems = [
        f"`{name}` must be {wanted}. Got {value!r:.80}."
        for name, check, wanted in _CHECKS
        if not check(value := getattr(config, name))
    ]
    is_other = not problems and (config.lora_dropout or config.use_dora)
    if is_other and config.target_parameters:
        problems = [
            "`lora_dropout` must be 0 and `use_dora` false with `target_parameters`, "
            f"as in PEFT. Got {config.lora_dropout} and {config.use_dora}."
        ]
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
            what = f"`{name}` must be a regular expression"
            problems.append(f"{what}. Got {pattern!r}: {error}.")
    return problems
