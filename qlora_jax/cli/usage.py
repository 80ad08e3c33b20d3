"""How a wrong command line, and one that nobody reads on, end the program."""

import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_UNREAD = 128 + 13  # what shells show for a program that SIGPIPE ended
# What jsonargparse says, and what this program says.
_PLAIN = (
    (r'Parser key "([\w.]+)":\s*(?=Expected|Does not validate)', r"`\1` "),
    (r'Parser key "([\w.]+)":\s*', r"`\1`: "),
    (r"Expected a (.*?)\. Got value: (.*)", r"must be \1. Got \2."),
    (
        r"Does not validate .*Subtypes: \[(.*?)\].*Given value: (.*)",
        r"must be \1. Got \2.",
    ),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"<class '(\w+)'>", r"\1"),
    (r", NoneType\b", ""),
    (r"must be float\b", "must be a number"),
    (r"must be int\b", "must be a whole number"),
    (r"must be bool\b", "must be true or false"),
    (r"--(\w+)/--\1\+", r"--\1"),
)


def as_typed(
    message: str, command: str, flags: Collection[str], positional: str | None
) -> str:
    """Returns an error of the parser with settings as a user types them.

    Args:
        message: The parser's.
        command: The command's name.
        flags: The settings that are flags.
        positional: The one that is none.

    Example:
        >>> as_typed("these are required: score.data", "score", ["data"], None)
        'these are required: --data'
        >>> as_typed("`model` must be whole; `out` new.", "quantize", ["out"], "model")
        '`MODEL` must be whole; `--out` new.'
    """

    def flag(found: re.Match, quote: str = "") -> str:
        name = found[1]
        if name not in flags:
            return f"{quote}{name.upper()}{quote}" if name == positional else found[0]
        return f"{quote}--{name}{quote}"

    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message, flags=re.DOTALL)
    message = re.sub(rf"\b{command}\.(\w+)", flag, message)
    return re.sub(r"`(\w+)`", lambda found: flag(found, "`"), message)


@contextmanager
def quiet_if_unread() -> Iterator[None]:
    """Ends the program where its output is no longer read, as by `| head`.

    Raises:
        SystemExit: Then.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is left at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_UNREAD) from None
