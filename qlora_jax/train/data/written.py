"""Refuses rows of which a chat template leaves something out.

A part of a row is written if the text changes without it. A long part that is once in
the row, and in the text but not in the template, needs no rendering.
"""

import bisect
import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]
_LONG = 12  # characters: more than a date, which a template may write by itself
_TRIED = 32  # the most characters that are changed, of a text that may be lost
_GONE = object()
# They say what kind a part is of, or number it.
_LABELS = {"role", "type", "id", "index"}
# Their parts are left to the template: a schema has more than a model should see.
_WHOLE = {"parameters"}


def check_written(
    render: Callable[[dict[str, Any]], str], row: dict[str, Any], text: str, source: str
) -> None:
    """Refuses a row, rendered as `text`, if the template omits part of it."""
    search = _Search(render, row, text, source)
    if lost := [path for name in row for path in search.lost((name,), row[name])]:
        raise ValueError(
            f"the chat template does not write all of {', '.join(map(_named, lost))}: "
            "the text is the same without. Leave it out of the row, or take a template "
            "that writes it."
        )


def _named(path: Path) -> str:
    steps = (f"[{x}]" if isinstance(x, int) else f".{x}" for x in path[1:])
    return f"`{path[0]}{''.join(steps)}`"


class _Search:
    def __init__(self, render: Any, row: dict[str, Any], text: str, source: str):
        self.render, self.row, self.text = render, row, text
        self.squeezed, self.source = _squeezed(text), _squeezed(source)
        self.row_text = _squeezed(_as_json(row))
        self.links = {*_links(row)}

    def lost(self, path: Path, value: Any) -> list[Path]:
        """Returns the paths in a part that are not written; its path if it is lost."""
        if _is_empty(value) or path in self.links or self._stands_once(value):
            return []
        parts = [(*path, key) for key in _keys(value, path)]
        if not parts:
            is_lost = self._is_same(path, _GONE) or self._loses_part(path, value)
            return [path] if is_lost else []
        lost = [self.lost(part, value[part[-1]]) for part in parts]
        is_message = path[0] != "tools" and len(path) < 3
        if not is_message and all(x == [y] for x, y in zip(lost, parts, strict=True)):
            return [path]
        return [part for found in lost for part in found]

    def _stands_once(self, value: Any) -> bool:
        forms = _forms(value)
        return (
            len(forms[-1]) >= _LONG
            and self.row_text.count(forms[-1]) == 1
            and not any(form in self.source for form in forms)
            and any(form in self.squeezed for form in forms)
        )

    def _is_same(self, path: Path, value: Any) -> bool:
        try:
            return self.render(_put(self.row, path, value)) == self.text
        except ValueError:  # the template needs it
            return False

    def _loses_part(self, path: Path, value: Any) -> bool:
        """Whether a character of a value can change and the text stay the same."""
        if not isinstance(value, str) or any(
            form in self.squeezed for form in _forms(value)
        ):
            return False
        # The template may write part of a value. Its longest prefix and suffix in the
        # text are written; try to change letters between them.
        places = [i for i, x in enumerate(value) if not x.isspace()]
        letters, size = _squeezed(value), len(places)
        lacks = lambda part: part not in self.squeezed
        begin = bisect.bisect(range(size), 0, key=lambda n: lacks(letters[: n + 1]))
        at_end = lambda n: lacks(letters[size - n - 1 :])
        end = bisect.bisect(range(size), 0, key=at_end)
        middle = [i for i in places[begin : size - end] if value[i].isalnum()]
        for i in middle[:: max(1, len(middle) // _TRIED)]:
            other = "b" if value[i] == "a" else "a"
            if self._is_same(path, f"{value[:i]}{other}{value[i + 1 :]}"):
                return True
        return False


def _links(row: dict[str, Any]) -> Iterator[Path]:
    """Yields where a tool's message names the call that its place names too."""
    calls: list[dict[str, Any]] = []
    for name, messages in row.items():
        for index, message in enumerate([] if name == "tools" else messages):
            if message["role"] == "tool":
                call = calls.pop(0) if calls else {}
                names = {**call, **call.get("function", {})}.get("name")
                known = {"tool_call_id": call.get("id"), "name": names}
                if all(message.get(key) in (None, x) for key, x in known.items()):
                    yield from ((name, index, key) for key in known)
            elif message.get("tool_calls"):
                calls = [*message["tool_calls"]]


def _is_empty(value: Any) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and not value.strip())


def _keys(value: Any, path: Path) -> list[str | int]:
    """Returns the keys of the parts that should be written."""
    if path[-1] in _WHOLE or not isinstance(value, dict | list):
        return []
    if isinstance(value, list):
        return [index for index, x in enumerate(value) if not _is_empty(x)]
    labels = () if "arguments" in path else _LABELS
    return [k for k, x in value.items() if not _is_empty(x) and k not in labels]


def _put(row: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Returns a copy of a row with another value at a path, or with none."""
    row = copy.deepcopy(row)
    *parents, last = path
    node: Any = functools.reduce(operator.getitem, parents, row)  # type: ignore
    if value is _GONE:
        del node[last]
    else:
        node[last] = value
    return row


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _forms(value: Any) -> list[str]:
    """Returns the forms of a value in a text: as it is, and last in JSON."""
    found = _squeezed(_as_json(value))
    return [_squeezed(value), found[1:-1]] if isinstance(value, str) else [found]
