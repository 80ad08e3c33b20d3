"""Names the file in the errors of reading it."""

import contextlib
import pathlib
from collections.abc import Iterator


class ModelError(ValueError):
    """The files of a model are wrong or incomplete. The fault is not in a row."""


@contextlib.contextmanager
def reading(
    source: str | pathlib.Path, error_type: type[ValueError] = ValueError
) -> Iterator[None]:
    """Turns all errors of a block that reads a broken file into one that names it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # A panic of code in Rust, such as that of tokenizers, is not an `Exception`.
    except BaseException as error:
        is_own = isinstance(error, (ValueError, OSError, ImportError))
        if is_own and str(source) in str(error):
            raise
        cause = str(error) if is_own else f"{type(error).__name__}: {error}"
        raise error_type(
            f"{source} cannot be read. {' '.join(cause.split())}"
        ) from error
