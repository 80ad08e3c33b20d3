"""Regular expressions that match whole paths of leaves, and settings by them."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Pattern = str | re.Pattern


def matches(patterns: Pattern | Iterable[Pattern], path: str) -> bool:
    """Whether any of the regular expressions matches the whole path."""
    if isinstance(patterns, Pattern):
        patterns = (patterns,)
    return any(re.fullmatch(p, path) for p in patterns)


def first_match(settings: Any, path: str, otherwise: Any) -> Any:
    """Returns the setting of the first pattern that matches the whole path."""
    for pattern, value in settings.items():
        if re.fullmatch(pattern, path):
            return value
    return otherwise


def as_patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    """Returns one pattern, or several, as a tuple.

    Args:
        name: What the setting is called in errors.
        value: The setting.

    Raises:
        TypeError: If it is neither text nor compiled from text, nor several of those.
        ValueError: If a pattern is not a regular expression.
    """
    if isinstance(value, Pattern):
        value = (value,)
    is_text = lambda p: isinstance(getattr(p, "pattern", p), str)
    if not isinstance(value, Iterable) or not all(map(is_text, value := tuple(value))):
        raise TypeError(
            f"`{name}` must be a regular expression, or a list of them. Got {value!r}."
        )
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must be a regular expression. Got {pattern!r}: {error}."
            ) from error
    return value


def by_pattern(
    name: str, value: Any, check: Callable[[Any], Any]
) -> dict[Pattern, Any]:
    """Returns a mapping from patterns to settings, each of them checked.

    Args:
        name: What the mapping is called in errors.
        value: The mapping.
        check: Maps a setting to the one that is kept; raises ValueError for a bad one.

    Raises:
        TypeError: If `value` is not a mapping, or as `as_patterns`.
        ValueError: As `as_patterns` and `check`.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of patterns. Got {value!r}.")
    patterns = as_patterns(name, value.keys())
    try:
        settings = [check(setting) for setting in value.values()]
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    return dict(zip(patterns, settings, strict=True))
