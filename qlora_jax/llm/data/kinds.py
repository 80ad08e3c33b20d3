"""Finds the kind of a row by its keys, and validates its fields."""

import difflib
import itertools
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import qlora_jax as ql

TrainOn = Literal["completions", "last", "all"]  # which tokens are targets
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    "{input}### Response:\n"
)


class Keys(NamedTuple):
    """The keys of the rows of a kind."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


Kinds = Mapping[str, Keys]
# A row with the keys of several kinds belongs to the first of them.
TEXT_KINDS = {
    "input_ids": Keys(("input_ids",), ("labels",)),
    "messages": Keys(("messages",), ("tools", "system")),
    "sharegpt": Keys(("conversations",), ("tools", "system")),
    "prompt/completion": Keys(("prompt", "completion"), ("tools", "system")),
    "alpaca": Keys(("instruction", "output"), ("input", "system")),
    "text": Keys(("text",), ()),
}
# Rows of preferences: pairs of completions, or single completions with a label.
PAIR_KINDS = {"preference": Keys(("chosen", "rejected"), ("prompt", "tools", "system"))}
LABELLED_KINDS = PAIR_KINDS | {
    "labelled answer": Keys(("prompt", "completion", "label"), ("tools", "system"))
}
# For each value of the argument `rows` of `read_dataset`: the kinds that it accepts.
FORMS = {"texts": TEXT_KINDS, "pairs": PAIR_KINDS, "labelled": LABELLED_KINDS}
# Fields that may be JSON in a string, since files such as CSV contain only strings.
_JSON_FIELDS = ("input_ids", "labels", "messages", "conversations", "tools")
# Keys with content that a model should see. A row is rejected if it has one of them and
# rows of its kind do not use this key.
_CONTENT_KEYS = {"tools", "functions", "system", "system_prompt", "history"}
_CONTENT_KEYS |= {"documents", "image", "images", "video", "videos", "audio", "audios"}
_CONTENT_KEYS |= {"chat_template_kwargs"}
# The types of parts of messages that are not text.
_MEDIA = {"image", "image_url", "audio", "input_audio", "video", "video_url"}
# The roles of ShareGPT's conversations.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_SHAREGPT_ROLES |= {x: x for x in ("user", "assistant", "system", "tool")}
# Keys that decide whether to train on a message: the first is OpenAI's, and the others
# are axolotl's.
_TRAIN_KEYS = ("weight", "train", "training")
# Values of `label` in KTO data, as strings in lower case: some files contain only
# strings, and others only floats.
_LABELS = {"true": True, "1": True, "1.0": True}
_LABELS |= {"false": False, "0": False, "0.0": False}


class Fields(NamedTuple):
    """The kind of a row, its values by our keys, and its keys that are not used.

    Unused keys with empty values are left out.
    """

    kind: str
    values: dict[str, Any]
    unused: list[str]


def check_keys(keys: Mapping[str, str] | None, kinds: Kinds) -> dict[str, str]:
    """Returns `keys`, after checking that they belong to a single kind."""
    keys = dict(keys or {})
    names = {kind: [*x.required, *x.optional] for kind, x in kinds.items()}
    if not any({*keys} <= {*kind_names} for kind_names in names.values()):
        raise ValueError(
            f"`keys` must belong to a single kind of row. The kinds are {names}. Got "
            f"{keys}."
        )
    if wrong := [name for name in keys.values() if not isinstance(name, str)]:
        raise ValueError(f"`keys` must map names to names. Got {wrong}.")
    return keys


def find_fields(
    row: Mapping[str, Any], keys: Mapping[str, str], kinds: Kinds
) -> Fields:
    """Returns the fields of a row. `keys` maps our keys to those in the rows."""
    alternatives = []
    if kinds is TEXT_KINDS:
        _check_no_pair(row, keys)
    for kind, (required, optional) in kinds.items():
        row_keys = {key: keys.get(key, key) for key in required + optional}
        if not {*keys} <= {*row_keys}:
            continue
        if all(row.get(row_keys[key]) is not None for key in required):
            values = {k: _parse_field(k, row.get(x)) for k, x in row_keys.items()}
            unused = [x for x in row if row[x] and x not in row_keys.values()]
            _check_unused(kind, unused)
            if kinds is TEXT_KINDS and "label" not in row_keys.values():
                _check_no_label(kind, row.get("label"), keys)
            return Fields(kind, values, unused)
        alternatives.append(" and ".join(f"`{row_keys[key]}`" for key in required))
    if [*row] == ["data"] and isinstance(row["data"], list):
        raise ValueError(
            "the row must be a single row. Got an object whose `data` is a list of "
            "rows. Write only the list, or one row per line."
        )
    nulls = [f"`{key}` is null" for key, value in row.items() if value is None]
    reason = f", where {' and '.join(nulls)}" if nulls else ""
    raise ValueError(
        f"the row must have {', or '.join(alternatives)}. Got {[*row]!s:.200}{reason}."
        f"{'' if keys or nulls else _suggest_keys(row, kinds)}"
    )


def _suggest_keys(row: Mapping[str, Any], kinds: Kinds) -> str:
    """Returns a sentence with `--keys` for the kind that is closest to a row."""
    # For each kind: how many of its keys are those of the row except for a typo,
    # whether it is one of the two most common kinds, and the option.
    options, known = [], {x for keys in kinds.values() for x in keys[0] + keys[1]}
    for kind, (required, optional) in kinds.items():
        names = (*(x for x in ("prompt",) if x in optional), *required)
        names = names if len(names) <= len(row) else required
        typos, columns = {}, [x for x in row if x not in known]
        for name in (x for x in names if x not in row):
            for close in difflib.get_close_matches(name, columns, 1):
                typos[name] = columns.pop(columns.index(close))
        missing = [x for x in names if x not in row and x not in typos]
        if len(missing) <= len(columns):
            score = len(names) - len(missing), kind in ("prompt/completion", "text")
            options.append((*score, typos | dict(zip(missing, columns, strict=False))))
    if not options:
        return ""
    *_, mapping = max(options, key=lambda option: option[:2])
    return f" If these are other names, use `--keys '{json.dumps(mapping)}'`."


def _check_no_pair(row: Mapping[str, Any], keys: Mapping[str, str]) -> None:
    # A pair can be used to train on texts only if `keys` names the answer to use.
    required = PAIR_KINDS["preference"].required
    has_pair = all(row.get(key) is not None for key in required)
    if has_pair and not {*required} & {*keys.values()}:
        raise ValueError(
            "rows with `chosen` and `rejected` need an `--objective` for preferences. "
            "To train on the chosen answers alone, name their key, as in `--keys "
            f'\'{{"messages": "chosen"}}\'`. Got {[*row]!s:.200}.'
        )


def _check_no_label(kind: str, label: object, keys: Mapping[str, str]) -> None:
    if kind == "text" and label is not None and not keys:
        raise ValueError(
            'rows with a `text` and a `label` need `--keys \'{"prompt": "text", '
            '"completion": "label"}\'` to learn the labels, or `--keys '
            f'\'{{"text": "text"}}\'` to learn the texts. Got {label!r:.40}.'
        )
    # Labels with other values, such as topics, are ignored.
    if kind not in ("text", "input_ids") and str(label).lower() in _LABELS:
        raise ValueError(
            "rows with a `label` of true or false need an `--objective` for labelled "
            "answers: others would train on the bad answers too. Leave `label` out to "
            f"train on all of them. Got {label!r}."
        )


def _check_unused(kind: str, unused: list[str]) -> None:
    if kind == "text" and "labels" in unused:
        raise ValueError("`labels` need `input_ids`. Got `text`.")
    content_keys = [key for key in unused if key in _CONTENT_KEYS]
    if content_keys and kind not in ("text", "input_ids"):
        raise ValueError(
            f"the row must not have {content_keys}, which rows of {kind} do not use. "
            "Leave them out, or write them into a field that is used."
        )


def _parse_field(name: str, value: Any) -> Any:
    if name not in _JSON_FIELDS or not isinstance(value, str):
        return value
    try:
        return ql.io.parse_json(value.encode(), "It") if value.strip() else None
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON if it is a string. {error}") from error


def find_messages(fields: Fields, is_chat: bool) -> tuple[str, str] | dict[str, Any]:
    """Returns the messages and tools of a row in a dict, or a pair of strings.

    The dict has "tools", and lists of messages by the names that errors use for them,
    such as "prompt". With `is_chat`, a prompt and a completion that are strings become
    messages. Otherwise, the pair of these strings is returned.
    """
    kind, values, _ = fields
    groups, tools = {}, _check_tools(values.get("tools"))  # "alpaca" has no tools
    # The system prompt comes first, as a message.
    if values["system"]:
        text = check_text("system", values["system"])
        groups["system"] = [{"role": "system", "content": text}]
    if kind in ("messages", "sharegpt"):
        name = TEXT_KINDS[kind].required[0]
        groups[name] = turns = values[name]
        if isinstance(turns, list):
            groups[name] = [_to_message(name, i, turn) for i, turn in enumerate(turns)]
    else:
        prompt, completion = _prompt_and_completion(kind, values, is_chat)
        are_texts = [isinstance(x, str) for x in (prompt, completion)]
        if all(are_texts) and not is_chat:
            if tools or groups:
                raise ValueError(
                    "`tools` and `system` need a chat template. It is applied to texts "
                    "only if `chat` is true, and to pairs of texts only with a "
                    "`prompt`."
                )
            return prompt, completion
        if all(are_texts):
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        elif any(are_texts):
            raise ValueError("`prompt` and `completion` must both be text or messages.")
        groups |= {"prompt": prompt, "completion": completion}
    groups = {name: _check_messages(name, group) for name, group in groups.items()}
    roles = [message["role"] for message in itertools.chain(*groups.values())]
    if "system" in groups and roles[1:2] == ["system"]:
        raise ValueError("the row must not have both `system` and a system message.")
    return groups | {"tools": tools}


def find_system_message(groups: tuple[str, str] | dict[str, Any]) -> str | None:
    """Returns the text of the system message with which a row begins, if it has one."""
    if isinstance(groups, tuple):
        return None
    lists = [group for name, group in groups.items() if name != "tools"]
    first = next(itertools.chain(*lists))
    is_text = first["role"] == "system" and isinstance(first["content"], str)
    return first["content"] if is_text else None


def _prompt_and_completion(
    kind: str, values: Mapping[str, Any], is_chat: bool
) -> tuple[Any, Any]:
    # Alpaca's are texts. Others may be texts or messages, which the caller checks.
    if kind != "alpaca":
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            check_text("completion", completion)
        return prompt, completion
    instruction = check_text("instruction", values["instruction"])
    context = check_text("input", values["input"] or "", allow_empty=True)
    completion = check_text("output", values["output"])
    if is_chat:
        prompt = f"{instruction}\n{context}" if context else instruction
        return prompt, completion
    paired = ", paired with an input that provides further context" if context else ""
    context = f"### Input:\n{context}\n\n" if context else ""
    prompt = ALPACA.format(instruction=instruction, paired=paired, input=context)
    return prompt, completion


def _to_message(name: str, index: int, turn: Any) -> Any:
    # Converts a turn of ShareGPT, which has `from` and `value`, to a message. Messages
    # stay as they are, and so do wrong values, which `_check_messages` rejects.
    if not isinstance(turn, dict) or "role" in turn or "from" not in turn:
        return turn
    if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
        raise ValueError(
            f"`{name}[{index}]` must be from one of {', '.join(_SHAREGPT_ROLES)}. Got "
            f"{turn['from']!r:.40}."
        )
    message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
    return message | {k: x for k, x in turn.items() if k not in ("from", "value")}


def _check_messages(name: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{name}` must be a list of messages. Got {messages!r:.40}.")
    for index, message in enumerate(messages):
        _check_message(f"{name}[{index}]", message)
    return messages


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"`{name}` must be an object with a `role`. Got {message!r:.40}."
        )
    content, calls = message.get("content"), message.get("tool_calls") or []
    if not isinstance(content, str | list | None):
        raise ValueError(f"`{name}` must have text as content. Got {content!r:.40}.")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") in _MEDIA:
            raise ValueError(f"`{name}` must have parts with text. Got {part!r:.40}.")
    if not isinstance(calls, list) or not all(map(_is_tool_call, calls)):
        raise ValueError(
            f"`{name}.tool_calls` must be a list of objects. If one has a "
            f"`function`, it must be an object. Got {calls!r:.40}."
        )
    # An empty user turn may be intended. In an empty answer, the only target would be
    # the token that ends it.
    if _is_empty(content) and not calls:
        if message["role"] == "assistant" or content is None:
            raise ValueError(f"`{name}` must have content. Got {message}.")


def take_train_keys(name: str, message: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns a message without `_TRAIN_KEYS`, and whether it may be trained on."""
    weights = {key: message[key] for key in _TRAIN_KEYS if message.get(key) is not None}
    message = {key: x for key, x in message.items() if key not in _TRAIN_KEYS}
    values = [*weights.values()]
    if any(x not in (0, 1) or x != values[0] for x in values):
        raise ValueError(
            f"`{name}` must have a `weight` of 0 or 1, or a `train` of false or true. "
            f"Got {weights}."
        )
    if 1 in values and message["role"] != "assistant":
        raise ValueError(
            f"`{name}` must not have a `weight` of 1 or `train: true`: only messages "
            f"of the assistant are trained. Got {weights} and {message['role']!r}."
        )
    return message, 0 not in values


def _is_tool_call(call: object) -> bool:
    # Some data sets write the name and the arguments into the call itself.
    return isinstance(call, dict) and isinstance(call.get("function", {}), dict)


def _is_empty(content: str | list | None) -> bool:
    parts = content if isinstance(content, list) else [content]
    # A part without text, such as one with reasoning, is content.
    values = [x.get("text", x) if isinstance(x, dict) else x for x in parts]
    return not any(x.strip() if isinstance(x, str) else x for x in values)


def check_text(name: str, value: object, *, allow_empty: bool = False) -> str:
    """Returns `value`, after checking that it is a string and not empty."""
    if not isinstance(value, str) or not (value or allow_empty):
        raise ValueError(f"`{name}` must be text. Got {value!r:.40}.")
    return value


def _check_tools(tools: Any) -> list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
        raise ValueError(f"`tools` must be a list of objects. Got {tools!r:.40}.")
    return tools


def split_preference(fields: Fields) -> list[tuple[str, bool, Fields]]:
    """Returns the key, the label and the fields of each completion of a preference."""
    values = fields.values
    if fields.kind == "labelled answer":
        label = values["label"]
        is_good = _LABELS.get(str(label).lower())
        if is_good is None:
            raise ValueError(f"`label` must be true or false. Got {label!r:.40}.")
        return [("completion", is_good, fields._replace(kind="prompt/completion"))]
    kind, prompt, chosen, rejected = _split_prompt(values)
    completions = (("chosen", True, chosen), ("rejected", False, rejected))
    return [
        (key, label, Fields(kind, values | {"prompt": prompt, "completion": x}, []))
        for key, label, x in completions
    ]


def _split_prompt(values: Mapping[str, Any]) -> tuple[str, Any, Any, Any]:
    # Returns a kind, a prompt and two completions. If a row has no prompt, the longest
    # common beginning of its completions is the prompt.
    prompt, chosen, rejected = (values[x] for x in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text or messages.")
    if chosen == rejected:
        raise ValueError(f"`chosen` and `rejected` must differ. Got {chosen!r:.80}.")
    # Some data sets repeat the prompt as a text, next to messages that contain it.
    repeats_prompt = isinstance(prompt, str) and isinstance(chosen, list)
    if prompt is not None and not repeats_prompt:
        return "prompt/completion", prompt, chosen, rejected
    pairs = zip(chosen, rejected, strict=False)
    size = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1  # most tokenizers join a space to the word after it
    shared = chosen[:size]
    # Whether one of the shared messages has the repeated prompt.
    has_prompt = any(isinstance(x, dict) and prompt in x.values() for x in shared)
    if not shared or (repeats_prompt and not has_prompt):
        raise ValueError(
            "the row must have a `prompt`, or `chosen` and `rejected` must begin with "
            f"it. Got {chosen!r:.80} and {rejected!r:.80}."
        )
    # A shared text may end in the middle of a sentence, so it is not a message. The
    # kind "text" tells the encoder not to use the chat template.
    kind = "text" if isinstance(chosen, str) else "prompt/completion"
    return kind, shared, chosen[size:], rejected[size:]
