"""Rejects a row if the chat template omits a part of it.

A part is omitted if removing it does not change the rendered text. Rendering is slow,
so the removal is not tried if the text clearly contains the part. That is so if the
part is long and appears in the text, but only once in the row and not in the template.
"""

import bisect
import copy
import functools
import itertools
import json
import operator
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[str | int, ...]
Render = Callable[[dict[str, Any]], str]  # renders a row
_MIN_UNIQUE = 12  # characters: more than a date, which a template may add by itself
# To find out whether a part of a string is omitted, about this many of its characters
# are changed, one at a time.
_MAX_TRIALS = 32
_REMOVED = object()
# Keys that only say what a part is or which one it is. Templates need not write these.
_LABEL_KEYS = {"role", "type", "id", "index"}
# Keys whose parts are not searched: templates need not write all of a JSON schema.
_OPAQUE_KEYS = {"parameters"}


def check_nothing_omitted(
    render: Render, row: dict[str, Any], text: str, template: str
) -> None:
    """Rejects a row, which was rendered as `text`, if the template omits a part."""
    search = _Search(render, row, text, template)
    paths = [path for name in row for path in search.find((name,), row[name])]
    if names := [*map(_dotted, paths)]:
        raise ValueError(
            f"the chat template does not write all of {', '.join(names)}: the text is "
            "the same without it. Remove it from the row, or use another template."
        )


def _dotted(path: Path) -> str:
    steps = (f"[{x}]" if isinstance(x, int) else f".{x}" for x in path[1:])
    return f"`{path[0]}{''.join(steps)}`"


class _Search:
    """Finds the omitted parts of a row."""

    def __init__(self, render: Render, row: dict[str, Any], text: str, template: str):
        self.render, self.row, self.text = render, row, text
        # Texts are compared without white space, which templates often change.
        self.dense_text = without_space(text)
        self.dense_template = without_space(template)
        [self.dense_row] = _dense_forms(row)
        self.redundant = {*_redundant_paths(row)}

    def find(self, path: Path, value: Any) -> list[Path]:
        """Returns the paths of omitted parts, or `path` if all of them are omitted."""
        if _is_empty(value) or path in self.redundant or self._is_surely_written(value):
            return []
        part_paths = [(*path, key) for key in _part_keys(value, path)]
        if not part_paths:
            is_omitted = self._is_same_with(path, _REMOVED)
            is_omitted = is_omitted or self._is_partly_omitted(path, value)
            return [path] if is_omitted else []
        # For each part: itself if it is omitted, or else its own omitted parts.
        omitted = [self.find(part, value[part[-1]]) for part in part_paths]
        # A value whose parts are all omitted is named instead of its parts, unless it
        # is a message or a list of messages, whose paths have one or two steps.
        is_messages = path[0] != "tools" and len(path) < 3
        is_total = omitted == [[part] for part in part_paths]
        if is_total and not is_messages:
            return [path]
        return [*itertools.chain(*omitted)]

    def _is_surely_written(self, value: object) -> bool:
        forms = _dense_forms(value)
        json_form = forms[-1]  # as it is in `dense_row`
        return (
            len(json_form) >= _MIN_UNIQUE
            and self.dense_row.count(json_form) == 1
            and not any(form in self.dense_template for form in forms)
            and any(form in self.dense_text for form in forms)
        )

    def _is_same_with(self, path: Path, value: Any) -> bool:
        try:
            return self.render(_replace(self.row, path, value)) == self.text
        except ValueError:  # the template needs the value
            return False

    def _is_partly_omitted(self, path: Path, value: object) -> bool:
        # Whether a character of a value can change while the text stays the same.
        forms = _dense_forms(value)
        if not isinstance(value, str) or any(x in self.dense_text for x in forms):
            return False
        # The template may write only the beginning and the end of the value. Find the
        # longest prefix and suffix that are in the text, and change letters in between.
        # `bisect` returns the first n for which n + 1 characters are not in the text.
        indices = [i for i, x in enumerate(value) if not x.isspace()]
        dense_value, size = without_space(value), len(indices)

        def lacks_prefix(n):
            return dense_value[: n + 1] not in self.dense_text

        def lacks_suffix(n):
            return dense_value[size - n - 1 :] not in self.dense_text

        prefix = bisect.bisect(range(size), 0, key=lacks_prefix)
        suffix = bisect.bisect(range(size), 0, key=lacks_suffix)
        middle = [i for i in indices[prefix : size - suffix] if value[i].isalnum()]
        for i in middle[:: max(1, len(middle) // _MAX_TRIALS)]:
            letter = "b" if value[i] == "a" else "a"
            if self._is_same_with(path, f"{value[:i]}{letter}{value[i + 1 :]}"):
                return True
        return False


def _redundant_paths(row: dict[str, Any]) -> Iterator[Path]:
    # Tool results name their call by its id or function. If the order of the messages
    # already identifies the call, templates need not write these keys.
    calls: list[dict[str, Any]] = []  # those that still wait for a result
    for name, messages in row.items():
        for index, message in enumerate([] if name == "tools" else messages):
            if message["role"] == "tool":
                call = calls.pop(0) if calls else {}
                function = {**call, **call.get("function", {})}
                expected = {"tool_call_id": call.get("id")}
                expected["name"] = function.get("name")
                if all(message.get(key) in (None, x) for key, x in expected.items()):
                    yield from ((name, index, key) for key in expected)
            elif message.get("tool_calls"):
                calls = [*message["tool_calls"]]


def _is_empty(value: object) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and not value.strip())


def _part_keys(value: Any, path: Path) -> list[Any]:
    if path[-1] in _OPAQUE_KEYS or not isinstance(value, dict | list):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    # The keys in the arguments of a tool call are those of the tool's parameters, so
    # even a key such as "type" must be written there.
    labels = () if "arguments" in path else _LABEL_KEYS
    return [key for key, x in items if not _is_empty(x) and key not in labels]


def _replace(row: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    *parents, last = path
    node: Any = functools.reduce(operator.getitem, parents, row)  # type: ignore
    if value is _REMOVED:
        del node[last]
    else:
        node[last] = value
    return row


def without_space(text: str) -> str:
    """Returns a text without its white space."""
    return "".join(text.split())


def _dense_forms(value: object) -> list[str]:
    # Templates write a string as it is or, inside JSON, with escapes. JSON comes last.
    form = without_space(json.dumps(value, ensure_ascii=False, default=str))
    return [without_space(value), form[1:-1]] if isinstance(value, str) else [form]
