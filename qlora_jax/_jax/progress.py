"""Progress bars, and counts with their nouns."""

from typing import Any


def progress_bar(
    description: str, unit: str, is_shown: bool = True, **settings: Any
) -> Any:
    """Returns a tqdm bar on stderr, which is shown only if stderr is a terminal."""
    from tqdm import tqdm

    disable = None if is_shown else True  # None: disabled unless on a terminal
    return tqdm(desc=description, unit=unit, disable=disable, **settings)


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Returns a number and its noun, such as "1 step" and "1,200 steps"."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
