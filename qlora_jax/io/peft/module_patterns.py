"""How PEFT's patterns choose modules.

Patterns come from files. Python's regular expressions can take exponential time, so
those with nested or many repetitions are refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_MAX_LENGTH = 4000
_MAX_REPETITIONS = 6


def check_regex(pattern: str) -> None:
    r"""Refuses a regular expression that is wrong or could take very long.

    Args:
        pattern: The expression; it is matched with short names.

    Raises:
        ValueError: If it does not compile, has more than 4,000 characters or six
            repetitions, repeats a group that repeats or chooses, or holds comments.

    Example:
        >>> check_regex(r".*\\.(q|v)_proj")
        >>> check_regex(r"(a+)+b")
        Traceback (most recent call last):
            ...
        ValueError: a pattern must have at most 6 repetitions, and repeat no group ...
    """
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(
            f"a pattern must have at most {_MAX_LENGTH} characters. Got {len(pattern)}."
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"a pattern must be a regular expression. Got {pattern!r}: {error}."
        ) from error
    if re.search(r"\(\?[a-zA-Z]*[x#]", pattern):
        raise ValueError(
            f"a pattern must hold no comments and no verbose flag. Got {pattern!r}."
        )
    if _is_slow(pattern):
        raise ValueError(
            f"a pattern must have at most {_MAX_REPETITIONS} repetitions, and repeat "
            "no group that repeats or chooses: matching it may take very long. Got "
            f"{pattern!r}. List the names instead."
        )


def _is_slow(pattern: str) -> bool:
    repetitions = 0
    groups = [False]  # whether each open group repeats or chooses
    before, after_group = "(", False
    for token in _TOKEN.findall(pattern):
        # A question mark behind a repetition or a bracket is no repetition.
        is_mark = token == "?" and (before == "(" or before[0] in "*+?{")
        repeats = token[0] in "*+?{" and not is_mark
        if repeats and after_group and token != "?":
            return True
        after_group = False
        if repeats and not token[1:-1].isdigit():
            repetitions, groups[-1] = repetitions + 1, True
        elif token == "|":
            groups[-1] = True
        elif token == "(":
            groups.append(False)
        elif token == ")":
            after_group = groups.pop()
            groups[-1] |= after_group
        before = "." if is_mark else token
    return repetitions > _MAX_REPETITIONS


# A character that is escaped, a class, a repetition in braces, or any character.
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{[0-9]*,?[0-9]*\}|.", re.DOTALL)


def is_targeted(
    module: str,
    targets: str | tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    layers_pattern: tuple[str, ...] = (),
) -> bool:
    """Whether PEFT's `target_modules` choose a module.

    Args:
        module: Its name, such as "model.layers.0.self_attn.q_proj".
        targets: A regular expression for whole names; or names, which match a whole
            name or its end behind a dot.
        layers: PEFT's `layers_to_transform`, for targets that match the end of a name.
        layers_pattern: What is in front of a layer's number; anything if empty.

    Example:
        >>> module = "model.layers.11.self_attn.q_proj"
        >>> is_targeted(module, ("q_proj",)), is_targeted(module, ("_proj",))
        (True, False)
        >>> is_targeted(module, ("q_proj",), layers=(1, 2))
        False
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    if not any(module.endswith(f".{target}") for target in targets):
        return False
    return layers is None or _layer(module, layers_pattern) in layers


def _layer(module: str, layers_pattern: tuple[str, ...]) -> int | None:
    if not layers_pattern:
        patterns = [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    else:
        patterns = [rf"(?:^|.*?\.){p}\.(?P<layer>\d+)\." for p in layers_pattern]
    for pattern in patterns:
        if match := re.match(pattern, module):
            return int(match["layer"]) if match["layer"] else None
    return None


def matches_key(key: str, module: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches a module.

    Example:
        >>> matches_key("q_proj", "model.layers.0.self_attn.q_proj")
        True
    """
    return re.match(rf"(.*\.)?({key})$", module) is not None


def setting_of(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Returns the setting of the first key that matches a module."""
    for key, value in patterns.items():
        if matches_key(key, module):
            return value
    return otherwise


def is_saved(parameter: str, modules_to_save: Iterable[str]) -> str | None:
    """Returns which of PEFT's `modules_to_save` holds a parameter, or None.

    PEFT compares the end of a module's name, with no dot before it: "norm" saves
    "input_layernorm" too.

    Example:
        >>> is_saved("model.layers.0.mlp.up_proj.weight", ["lm_head", "mlp"])
        'mlp'
    """
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    for saved in modules_to_save:
        if any(module.endswith(saved) for module in modules):
            return saved
    return None


def is_inside_saved(module: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT keeps adapters from a module because `modules_to_save` holds it."""
    escaped = map(re.escape, modules_to_save)
    return any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in escaped)
