"""Regular expressions that match full paths of leaves, and settings by them."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

Pattern = str | re.Pattern


def matches(patterns: Pattern | Iterable[Pattern], path: str) -> bool:
    """Returns whether any of the regular expressions matches all of the path."""
    if isinstance(patterns, Pattern):
        patterns = (patterns,)
    return any(re.fullmatch(p, path) for p in patterns)


def unmatched_by(patterns: Iterable[Pattern], paths: Collection[str]) -> list[Pattern]:
    """Returns the patterns that match none of the paths."""
    return [p for p in patterns if not any(matches(p, path) for path in paths)]


def first_match(settings: Any, path: str, otherwise: Any) -> Any:
    """Returns the setting of the first pattern that matches all of the path."""
    for pattern, value in settings.items():
        if re.fullmatch(pattern, path):
            return value
    return otherwise


def as_patterns(name: str, value: Any) -> tuple[Pattern, ...]:
    """Returns one pattern, or several, as a tuple.

    Raises TypeError or ValueError, with `name`, if one is no regular expression.
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
    """Returns a mapping from patterns to settings, each passed through `check`.

    Raises TypeError or ValueError, with `name`, for bad patterns and settings.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of patterns. Got {value!r}.")
    patterns = as_patterns(name, value.keys())
    try:
        settings = [check(setting) for setting in value.values()]
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    return dict(zip(patterns, settings, strict=True))
