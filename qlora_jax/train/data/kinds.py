"""Tells the kind of a row by its keys."""

import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "{input}### Response:\n"
)


# The keys that rows of each kind must have, and those they may have. A row of several
# kinds is of the first.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "input_ids": (("input_ids",), ("labels",)),
    "messages": (("messages",), ("tools", "system")),
    "sharegpt": (("conversations",), ("tools", "system")),
    "prompt/completion": (("prompt", "completion"), ("tools", "system")),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}
# Rows of preferences: pairs of answers, and answers with a label.
PAIRS = {"preference": (("chosen", "rejected"), ("prompt", "tools", "system"))}
LABELLED = {"labelled answer": (("prompt", "completion", "label"), ("tools", "system"))}
# Fields that may be JSON text, in files such as CSV that hold only text.
_JSON = ("input_ids", "labels", "label", "messages", "conversations", "tools")
# Keys that a model should see with a conversation: refused if not used.
_SEEN = {"tools", "functions", "system", "system_prompt", "history", "documents"}
_SEEN |= {"image", "images", "video", "videos", "audio", "audios"}
_SEEN |= {"chat_template_kwargs"}
# Who speaks in ShareGPT's conversations.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_ROLES |= {role: role for role in ("user", "assistant", "system", "tool")}
# Keys that say whether a message is trained: OpenAI's, and those of axolotl.
_TRAIN_KEYS = ("weight", "train", "training")
# Values of `label` for a good answer and for a bad one; files of text have texts.
_LABELS = {"true", "false", "1", "0"}


class Fields(NamedTuple):
    """The kind of a row, its values by our names, and its other keys."""

    kind: str
    values: dict[str, Any]
    unused: list[str]  # those that have a value


def check_keys(
    keys: Mapping[str, str] | None, kinds: Mapping[str, Any] = KINDS
) -> dict[str, str]:
    """Returns `keys` as a dict; refuses keys of more than one kind."""
    keys = dict(keys or {})
    known = {name: [*needed, *more] for name, (needed, more) in kinds.items()}
    if not any({*keys} <= {*names} for names in known.values()):
        raise ValueError(f"`keys` must be of one kind of {known}. Got {keys}.")
    if wrong := [name for name in keys.values() if not isinstance(name, str)]:
        raise ValueError(f"`keys` must name keys. Got {wrong}.")
    return keys


def find_fields(
    row: Mapping[str, Any], keys: Mapping[str, str], kinds: Mapping[str, Any] = KINDS
) -> Fields:
    """Returns the fields of a row, with its kind."""
    wanted = []
    if kinds is KINDS:
        _check_pair(row, keys)
    for kind, (needed, more) in kinds.items():
        names = {key: keys.get(key, key) for key in needed + more}  # in the row
        if not {*keys} <= {*names}:
            continue
        if all(row.get(names[key]) is not None for key in needed):
            values = {key: _from_json(key, row.get(names[key])) for key in names}
            unused = [key for key in row if row[key] and key not in names.values()]
            _check_unused(kind, unused)
            if kinds is KINDS and "label" not in names.values():
                _check_label(kind, row.get("label"))
            return Fields(kind, values, unused)
        wanted.append(" and ".join(f"`{names[key]}`" for key in needed))
    raise ValueError(
        f"it must have {', or '.join(wanted)}. Got {[*row]!s:.200}. "
        '`--keys \'{"prompt": "question", "completion": "answer"}\'` names others.'
    )


def _check_pair(row: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    """Refuses pairs of answers where no key of `keys` says which one to train on."""
    pair = [key for key in PAIRS["preference"][0] if row.get(key) is not None]
    if len(pair) == 2 and not {*pair} & {*keys.values()}:
        raise ValueError(
            "rows with `chosen` and `rejected` need `--objective dpo`, ipo, orpo, "
            "simpo or kto. To train on the chosen answers alone, name their key, as in "
            f'`--keys \'{{"messages": "chosen"}}\'`. Got {[*row]!s:.200}.'
        )


def _check_label(kind: str, label: Any) -> None:
    """Refuses labels of good and bad answers; other labels are notes."""
    if kind not in ("text", "input_ids") and str(label).lower() in _LABELS:
        raise ValueError(
            "rows with a `label` of true or false need `--objective kto`: sft would "
            "train on the bad answers too. Leave `label` out to train on all of them. "
            f"Got {label!r}."
        )


def _check_unused(kind: str, unused: list[str]) -> None:
    if kind == "text" and "labels" in unused:
        raise ValueError("`labels` need `input_ids`. Got `text`.")
    seen = [key for key in unused if key in _SEEN]
    if seen and kind not in ("text", "input_ids"):
        raise ValueError(
            f"it must not have {seen}: rows of {kind} do not use them. Leave them out, "
            "or write them into what is used."
        )


def _from_json(name: str, value: Any) -> Any:
    if name not in _JSON or not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` must be JSON where text. {error}") from error


def find_messages(fields: Fields, is_chat: bool) -> tuple[str, str] | dict[str, Any]:
    """Returns a row's messages by the names that errors give them, and `tools`.

    Without `is_chat`, a prompt and a completion that are texts are returned unchanged.
    """
    kind, values, _ = fields
    row, tools = {}, _check_tools(values.get("tools"))
    if values["system"]:
        text = check_text("system", values["system"])
        row["system"] = [{"role": "system", "content": text}]
    if kind in ("messages", "sharegpt"):
        name = KINDS[kind][0][0]
        row[name] = turns = values[name]
        if isinstance(turns, list):
            row[name] = [_from_turn(name, i, turn) for i, turn in enumerate(turns)]
    else:
        prompt, completion = _pair(kind, values, is_chat)
        are_texts = [isinstance(x, str) for x in (prompt, completion)]
        if all(are_texts) and not is_chat:
            if tools or row:
                raise ValueError("`tools` and `system` need a chat template.")
            return prompt, completion
        if all(are_texts):
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        elif any(are_texts):
            raise ValueError("`prompt` and `completion` must both be text or messages.")
        row |= {"prompt": prompt, "completion": completion}
    row = {name: _check_messages(name, messages) for name, messages in row.items()}
    _, second, *_ = [*itertools.chain(*row.values()), {"role": ""}]
    if "system" in row and second["role"] == "system":
        raise ValueError("it must not have both `system` and a message of one.")
    return row | {"tools": tools}


def _pair(kind: str, values: Mapping[str, Any], is_chat: bool) -> tuple[Any, Any]:
    """Returns a prompt and a completion; both may be messages."""
    if kind != "alpaca":
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            check_text("completion", completion)
        return prompt, completion
    prompt = check_text("instruction", values["instruction"])
    given = check_text("input", values["input"] or "", empty=True)
    completion = check_text("output", values["output"])
    if is_chat:
        return f"{prompt}\n{given}" if given else prompt, completion
    paired = ", paired with an input that provides further context" if given else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    return ALPACA.format(instruction=prompt, paired=paired, input=given), completion


def _from_turn(name: str, index: int, turn: Any) -> Any:
    """Converts a turn of ShareGPT's conversations to a message; others stay."""
    if not isinstance(turn, dict) or "role" in turn or "from" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if not isinstance(turn["from"], str) or turn["from"] not in _ROLES:
        raise ValueError(
            f"`{name}[{index}]` must be from one of {', '.join(_ROLES)}. Got "
            f"{turn['from']!r:.40}."
        )
    return {"role": _ROLES[turn["from"]], "content": turn.get("value"), **rest}


def _check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    """Refuses messages of another kind, and empty turns of the assistant."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` must be a list of messages. Got {messages!r:.40}.")
    for index, message in enumerate(messages):
        _check_message(f"{name}[{index}]", message)
    return messages


def _check_message(place: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        got = f"{message!r:.40}"
        raise ValueError(f"`{place}` must be an object with a `role`. Got {got}.")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if not isinstance(content, str | list | None):
        got = f"{content!r:.40}"
        raise ValueError(f"`{place}` must have text as its content. Got {got}.")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not _has_more(part):
            got = f"{part!r:.40}"
            raise ValueError(f"`{place}` must have parts with a text. Got {got}.")
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise ValueError(
            f"`{place}.tool_calls` must be a list of objects, each with a `function`. "
            f"Got {calls!r:.40}."
        )
    if not _says_something(content) and not calls:
        if message["role"] == "assistant" or content is None:
            raise ValueError(f"`{place}` must have content. Got {message}.")


def split_trained(place: str, message: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns a message without the keys for its loss, and whether it may be trained.

    Only messages of the assistant may have a `weight` of 1 or `train: true`.
    """
    weights = {key: message[key] for key in _TRAIN_KEYS if message.get(key) is not None}
    message = {key: x for key, x in message.items() if key not in _TRAIN_KEYS}
    values = [*weights.values()]
    if any(x not in (0, 1) or x != values[0] for x in values):
        raise ValueError(
            f"`{place}` must have a `weight` of 0 or 1, or a `train` of false or true. "
            f"Got {weights}."
        )
    if 1 in values and message["role"] != "assistant":
        raise ValueError(
            f"`{place}` must not have a `weight` of 1 or `train: true`: only messages "
            f"of the assistant are trained. Got {weights} and {message['role']!r}."
        )
    return message, 0 not in values


def _has_more(part: dict) -> bool:
    """Whether a part is more than a placeholder for an image or a sound."""
    return part.get("type") == "text" or any(part[key] for key in part if key != "type")


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function", {}), dict)


def _says_something(content: str | list | None) -> bool:
    parts = content if isinstance(content, list) else [content]
    texts = [x.get("text", x) if isinstance(x, dict) else x for x in parts]
    return any(x.strip() if isinstance(x, str) else x for x in texts)


def check_text(name: str, value: Any, *, empty: bool = False) -> str:
    """Returns `value`; refuses what is no text, or an empty one."""
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"`{name}` must be text. Got {value!r:.40}.")
    return value


def _check_tools(tools: Any) -> list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
        raise ValueError(f"`tools` must be a list of objects. Got {tools!r:.40}.")
    return tools
