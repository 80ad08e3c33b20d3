"""Silences errors that Orbax both logs and raises."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps Orbax's threads from printing tracebacks of errors that are also raised."""
    from absl import logging

    logger, hook = logging.get_absl_logger(), sys.unraisablehook
    level = logger.level

    def quiet_hook(found: Any) -> None:
        # Writes that were under way when another one failed.
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    logger.setLevel("CRITICAL")
    sys.unraisablehook = quiet_hook
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
