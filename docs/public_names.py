"""Lets mkdocstrings read the package as its users do.

Loaded by mkdocs.yml as an extension of Griffe, which reads the code without running it.
"""

import re
from typing import Any

import griffe


class PublicNames(griffe.Extension):
    """Puts public names where `__all__` says they are, and examples in code blocks."""

    def on_package(self, *, pkg: griffe.Module, **unused: Any) -> None:
        """Undoes shadowing: `nnx.wrap` is the function, not the file `nnx/wrap.py`.

        Griffe keeps submodules and imported names in one table.
        """
        del unused
        for module in (pkg, *pkg.modules.values()):
            sources = {str(n): module.imports.get(str(n)) for n in module.exports or ()}
            found = {
                name: pkg[source.partition(".")[2]]
                for name, source in sources.items()
                if source and source != module.members[name].path
            }
            for name, target in found.items():
                module.del_member(name)
                module.set_member(name, griffe.Alias(name, target))

    def on_instance(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Reads "Example:" as the section that Griffe calls "Examples:"."""
        del unused
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)
