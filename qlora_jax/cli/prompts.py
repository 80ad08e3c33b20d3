"""Reads the prompts of a file."""

import itertools
from typing import Any, NamedTuple

import qlora_jax as ql

from ..train.data.kinds import Fields, check_text, find_messages
from ..train.data.rows import converted, open_file
from .configs import GenerateConfig


class Prompt(NamedTuple):
    """A prompt of a file."""

    value: Any  # a text or messages
    ids: list[int]


def read_prompts(
    config: GenerateConfig,
    tokenizer: "ql.train.Tokenizer",
    is_chat: bool,
    vocab_size: int,
) -> list[Prompt]:
    """Returns the prompts of the file; rows that are wrong are named, all of them."""

    def prompt(_: int, row: dict[str, Any]) -> Prompt:
        value = row.get("prompt", row.get("messages"))
        if is_chat or not isinstance(value, str):
            ids = _rendered(value, row, config.system, tokenizer)
        elif used := [name for name in ("system", "tools") if row.get(name)]:
            raise ValueError(f"it must not have {used} without a chat template.")
        else:
            ids = tokenizer.encode(check_text("prompt", value))
        return Prompt(value, check_ids(ids, value, vocab_size))

    return [*converted(open_file(str(config.prompts), "prompts"), prompt)]


def _rendered(
    value: Any, row: dict[str, Any], system: str | None, tokenizer: Any
) -> list[int]:
    if value is None:
        raise ValueError(f"it must have `prompt` or `messages`. Got {[*row]!s:.200}.")
    if isinstance(value, str):
        value = [{"role": "user", "content": check_text("prompt", value)}]
    values = {"messages": value, "system": row.get("system") or system}
    values |= {"tools": row.get("tools")}
    parts: Any = find_messages(Fields("messages", values, []), True)
    tools, messages = parts.pop("tools"), [*itertools.chain(*parts.values())]
    if messages[-1]["role"] == "assistant":
        raise ValueError("its last message must not be an answer.")
    tokenizer.chat.check_roles(parts, tools)
    text = tokenizer.render(messages, tools, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def check_ids(ids: list[int], prompt: Any, vocab_size: int) -> list[int]:
    """Returns the tokens of a prompt; refuses none, and those out of range."""
    if not ids:
        raise ValueError(f"`prompt` must have tokens. Got {prompt!r}.")
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be less than {vocab_size}, as many as the model "
            f"has. Got {max(ids)}."
        )
    return ids
