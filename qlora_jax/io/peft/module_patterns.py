"""Matches modules as PEFT's patterns do."""

import re
from collections.abc import Iterable, Mapping
from typing import Any


def is_targeted(
    module: str,
    targets: str | tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    layers_pattern: tuple[str, ...] = (),
) -> bool:
    """Returns whether PEFT's `target_modules` match a module.

    Text is a regular expression for full names. Names match a full name; or its end
    after a dot, in `layers` only (None for all), whose number follows `layers_pattern`.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    if not any(module.endswith(f".{target}") for target in targets):
        return False
    return layers is None or _layer(module, layers_pattern) in layers


def _layer(module: str, layers_pattern: tuple[str, ...]) -> int | None:
    for pattern in map(layer_regex, layers_pattern or ("",)):
        if match := re.match(pattern, module):
            return int(match["layer"]) if match["layer"] else None
    return None


def layer_regex(prefix: str) -> str:
    """Returns a regular expression for names with a layer's number after a prefix."""
    before = rf"(?:^|.*?\.){prefix}" if prefix else r".*?\.[^.]*"
    return rf"{before}\.(?P<layer>\d+)\."


def key_regex(key: str) -> str:
    """Returns the regular expression of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def matches_key(key: str, module: str) -> bool:
    """Returns whether a key of `rank_pattern` or `alpha_pattern` matches a module."""
    return re.match(key_regex(key), module) is not None


def setting_of(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Returns the setting of the first key that matches a module."""
    found = (value for key, value in patterns.items() if matches_key(key, module))
    return next(found, otherwise)


def is_saved(parameter: str, modules_to_save: Iterable[str]) -> bool:
    """Returns whether one of PEFT's `modules_to_save` holds a parameter."""
    # PEFT compares ends without a dot: "norm" saves "input_layernorm" too.
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(module.endswith((*modules_to_save,)) for module in modules)


def is_inside_saved(module: str, modules_to_save: Iterable[str]) -> bool:
    """Returns whether `modules_to_save` holds a module, and PEFT adds no adapter."""
    escaped = map(re.escape, modules_to_save)
    return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in escaped)
