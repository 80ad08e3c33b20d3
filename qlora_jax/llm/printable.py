"""Makes text from files safe to print."""

import re

# Control characters, which terminals obey, and half characters, which have no bytes.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """Returns a text with control characters as escapes, except for those in `keep`."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        is_kept = character in keep
        return character if is_kept else ascii(character)[1:-1]

    return _UNPRINTABLE.sub(escape, str(text))


def printable_lines(text: object) -> str:
    """Returns a text in which line breaks and tabs are the only control characters."""
    return printable(text, "\n\t")
