"""Loads the names of a package when they are first used."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any


def make_getattr(
    package: str, names: Sequence[str], modules: Sequence[str]
) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package, which finds `names` in its modules."""

    def find_name(name: str) -> Any:
        if name in names:
            for module_name in modules:
                module = importlib.import_module(f".{module_name}", package)
                value = getattr(module, name, None)
                # Modules may also import another value under this name.
                if getattr(value, "__module__", None) == module.__name__:
                    return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find_name
