"""Kinds of rows, told by their keys."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "{input}### Response:\n"
)
# Required and optional keys. A row of several kinds is of the first.
KINDS = {
    "input_ids": (("input_ids",), ("labels",)),
    "messages": (("messages",), ("tools",)),
    "prompt/completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input",)),
    "text": (("text",), ()),
}


class Fields(NamedTuple):
    """A row's kind, and its values by our names."""

    kind: str
    values: dict[str, Any]


def check_keys(keys: Mapping[str, str] | None) -> dict[str, str]:
    """Checks that names of keys belong to one kind.

    Raises:
        ValueError: If they do not.
    """
    keys = dict(keys or {})
    kinds = [k for k, (must, may) in KINDS.items() if {*keys} <= {*must, *may}]
    if not kinds:
        known = {kind: [*must, *may] for kind, (must, may) in KINDS.items()}
        raise ValueError(f"`keys` must be of one kind of {known}. Got {keys}.")
    if wrong := [name for name in keys.values() if not isinstance(name, str)]:
        raise ValueError(f"`keys` must name keys. Got {wrong}.")
    return keys


def find_fields(row: Mapping[str, Any], keys: Mapping[str, str]) -> Fields:
    """Tells the kind of a row.

    Args:
        row: The row.
        keys: What our names are called in it, where another name.

    Raises:
        ValueError: If it is of no kind.
    """
    for kind, (must, may) in KINDS.items():
        if not {*keys} <= {*must, *may}:
            continue
        names = {ours: keys.get(ours, ours) for ours in (*must, *may)}
        if all(row.get(names[ours]) is not None for ours in must):
            values = {ours: row.get(theirs) for ours, theirs in names.items()}
            if kind == "text" and row.get("labels") is not None:
                raise ValueError("`labels` need `input_ids`. Got `text`.")
            return Fields(kind, values)
    wanted = [
        " and ".join(f"`{keys.get(ours, ours)}`" for ours in must)
        for must, may in KINDS.values()
        if {*keys} <= {*must, *may}
    ]
    raise ValueError(f"it must have {', or '.join(wanted)}. Got {[*row]!s:.200}.")


def alpaca_prompt(instruction: str, given: str) -> str:
    """Returns the prompt that Alpaca was trained with."""
    return ALPACA.format(
        instruction=instruction,
        paired=", paired with an input that provides further context" if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )


def check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    """Returns messages as a chat template takes them.

    Raises:
        ValueError: If they are of another kind.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` must be a list of messages. Got {messages!r:.40}.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"`{name}[{index}]` must be an object with a `role`. Got "
                f"{message!r:.40}."
            )
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise ValueError(
                f"`{name}[{index}]` must have text as its content. Got {content!r:.40}."
            )
        if not content and not message.get("tool_calls"):
            if message["role"] == "assistant" or content is None:
                raise ValueError(f"`{name}[{index}]` must have content. Got {message}.")
    return messages


def check_text(name: str, value: Any, *, empty: bool = False) -> str:
    """Returns a text.

    Raises:
        ValueError: If it is none, or empty where it must not be.
    """
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"`{name}` must be text. Got {value!r:.40}.")
    return value


def check_tools(tools: Any) -> list[Any] | None:
    """Returns tools, which may come as JSON.

    Raises:
        ValueError: If they are not a list of objects.
    """
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`tools` must be JSON where text. {error}") from error
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(x, dict) for x in found):
        raise ValueError(f"`tools` must be a list of objects. Got {tools!r:.40}.")
    return found
