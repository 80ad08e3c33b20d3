"""Progress bars."""

from typing import Any


def progress_bar(description: str, unit: str, is_shown: bool, **settings: Any) -> Any:
    """Returns a tqdm bar on stderr, which is shown only if stderr is a terminal."""
    from tqdm import tqdm

    disable = None if is_shown else True  # None: disabled unless on a terminal
    return tqdm(desc=description, unit=unit, disable=disable, **settings)
