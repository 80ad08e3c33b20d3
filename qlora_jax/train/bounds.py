"""What a chat template may make: refuses values that would take much memory."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError

MAX_LENGTH = 1 << 24  # of a value, in characters or items
# A width of five digits, or one that is an argument: in "%5d", and in "{:5}".
_WIDTHS = {
    "%": re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)"),
    "{": re.compile(r":[^{}]*(\d{5}|\{)"),
}
# Filters and methods of texts that take a length.
_LENGTHS = {"batch", "center", "indent", "slice", "truncate", "wordwrap"}
_LENGTHS |= {"expandtabs", "ljust", "rjust", "zfill"}
_MAX_JSON_INDENT = 16


def is_int(x: Any) -> bool:
    """Whether a value is an integer, and no truth value."""
    return isinstance(x, int) and not isinstance(x, bool)


def check_length(found: Any) -> None:
    """Refuses a length, or a value, that is too long."""
    length = found if is_int(found) else 0
    if isinstance(found, str | list | tuple | dict):
        length = len(found)
    if length > MAX_LENGTH:
        raise SecurityError(f"It makes a value longer than {MAX_LENGTH}.")


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuses a sum, product, power or format whose result is too long."""
    sized = lambda x: isinstance(x, str | list | tuple)
    if operator == "%" and isinstance(left, str):
        _check_format("%", left)
    elif operator == "**" and is_int(left) and is_int(right):
        check_length(abs(right) * left.bit_length())
    elif operator == "+" and sized(left) and sized(right):
        check_length(len(left) + len(right))
    elif operator == "*" and is_int(left) and is_int(right):
        check_length(left.bit_length() + right.bit_length())
    elif operator == "*":
        check_length((len(left) if sized(left) else int(left)) * _factor(right))


def _factor(x: Any) -> int:
    return len(x) if isinstance(x, str | list | tuple) else int(x)


def check_call(name: str, value: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuses a filter, or a method of a text, whose result is too long.

    Args:
        name: What it is called.
        value: What it is applied to.
        args: What else it is given.
        kwargs: The same, by name.
    """
    given = [*args, *kwargs.values()]
    longest = max((abs(x) for x in given if is_int(x)), default=0)
    length = len(value) if isinstance(value, str | list | tuple) else 1
    texts = [len(x) for x in given if isinstance(x, str)]
    if name in ("format", "format_map") and isinstance(value, str):
        _check_format("{", value)
    elif name in _LENGTHS:
        check_length(longest * (length if name == "indent" else 1))
    elif name == "tojson" and longest > _MAX_JSON_INDENT:
        raise SecurityError(f"It indents JSON by {longest}.")
    elif name in ("join", "replace", "translate"):
        check_length((length + 1) * max(texts, default=1))


def bounded_filter(name: str, function: Callable) -> Callable:
    """Wraps a filter so that it makes nothing too long."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        # Some take Jinja's context first, which is no length.
        skipped = 2 if hasattr(function, "jinja_pass_arg") else 1
        value, given = args[skipped - 1], args[skipped:]
        if name == "format" and isinstance(value, str):
            _check_format("%", value)
        else:
            check_call(name, value, given, kwargs)
        found = function(*args, **kwargs)
        check_length(found)
        return found

    return wrapped


def _check_format(kind: str, text: str) -> None:
    if _WIDTHS[kind].search(text):
        raise SecurityError(f"It asks for a width of {text!r:.40}.")
