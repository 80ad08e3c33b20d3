"""Progress bars, and counts in words."""

from typing import Any


def progress_bar(what: str, unit: str, shown: bool = True, **settings: Any) -> Any:
    """Returns tqdm's bar on stderr, shown on terminals alone, with its settings."""
    from tqdm import tqdm

    hidden = None if shown else True  # None: where stderr is no terminal
    return tqdm(desc=what, unit=unit, disable=hidden, **settings)


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Returns a number and its noun, such as "1 step" and "1,200 steps"."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
