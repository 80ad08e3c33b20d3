"""Progress bars."""

from typing import Any


def progress_bar(what: str, unit: str, shown: bool = True, **settings: Any) -> Any:
    """Returns tqdm's bar on stderr, shown on terminals alone, with its settings."""
    from tqdm import tqdm

    hidden = None if shown else True  # None: where stderr is no terminal
    return tqdm(desc=what, unit=unit, disable=hidden, **settings)
