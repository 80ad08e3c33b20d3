"""Turns rows of every kind into one normal form, before any text is rendered.

The normal form of a row is a `Conversation`, which the chat template writes, or a
`Text`, which is tokenized as it is. A row with a pair of answers becomes two of them.
"""

import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import qlora_jax as ql

TrainOn = Literal["completions", "last", "all"]  # which tokens are targets
Message = dict[str, Any]
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


class Text(NamedTuple):
    """A text without a chat template. It has no system message."""

    text: str
    start: int | None  # where its answer begins; None if all of it is to be learned


class Conversation(NamedTuple):
    """Messages, which the chat template writes."""

    groups: dict[str, list[Message]]  # by their keys in the row, for error messages
    tools: list[Any] | None
    start: int  # the index of the first message after the prompt
    skipped: list[int]  # the messages that the row tells not to train on

    @property
    def messages(self) -> list[Message]:
        """All messages, in order."""
        return [*itertools.chain(*self.groups.values())]


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
    # A pair can be used to train on texts only if `keys` names the answer to use.
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    if (
        kinds is TEXT_KINDS
        and is_pair
        and not {"chosen", "rejected"} & {*keys.values()}
    ):
        raise ValueError(
            "rows with `chosen` and `rejected` need an `--objective` for preferences. "
            "To train on the chosen answers alone, name their key, as in `--keys "
            f'\'{{"messages": "chosen"}}\'`. Got {[*row]!s:.200}.'
        )
    alternatives = []
    for kind, (required, optional) in kinds.items():
        row_keys = {key: keys.get(key, key) for key in required + optional}
        if not {*keys} <= {*row_keys}:
            continue
        if all(row.get(row_keys[key]) is not None for key in required):
            values = {key: row.get(name) for key, name in row_keys.items()}
            for key, value in values.items():
                if isinstance(value, str) and key in _JSON_FIELDS:
                    values[key] = _parse_field(key, value)
            unused = [x for x in row if row[x] and x not in row_keys.values()]
            _check_unused(kind, row, unused, keys)
            return Fields(kind, values, unused)
        alternatives.append(" and ".join(f"`{row_keys[key]}`" for key in required))
    raise ValueError(
        f"the row must have {', or '.join(alternatives)}. {_describe_keys(row)}"
    )


def _describe_keys(row: Mapping[str, Any]) -> str:
    # Returns the end of the message about a row that is of no kind.
    if [*row] == ["data"] and isinstance(row["data"], list):
        return (
            "Got an object whose `data` is a list of rows. Write only the list, or one "
            "row per line."
        )
    nulls = [f"`{key}` is null" for key, value in row.items() if value is None]
    hint = "If these are other names, map ours to yours with `--keys`."
    ending = f", where {' and '.join(nulls)}." if nulls else f". {hint}"
    return f"Got {[*row]!s:.200}{ending}"


def _check_unused(
    kind: str, row: Mapping[str, Any], unused: list[str], keys: Mapping[str, str]
) -> None:
    label = None if "label" in keys.values() else row.get("label")
    if kind in ("text", "input_ids"):
        if kind == "text" and "labels" in unused:
            raise ValueError("`labels` need `input_ids`. Got `text`.")
        if kind == "text" and label is not None and not keys:
            raise ValueError(
                'rows with a `text` and a `label` need `--keys \'{"prompt": "text", '
                '"completion": "label"}\'` to learn the labels, or `--keys '
                f'\'{{"text": "text"}}\'` to learn the texts. Got {label!r:.40}.'
            )
        return
    if content_keys := [key for key in unused if key in _CONTENT_KEYS]:
        raise ValueError(
            f"the row must not have {content_keys}, which rows of {kind} do not use. "
            "Leave them out, or write them into a field that is used."
        )
    # Labels with other values, such as topics, are ignored.
    if kind in TEXT_KINDS and str(label).lower() in _LABELS:
        raise ValueError(
            "rows with a `label` of true or false need an `--objective` for labelled "
            "answers: others would train on the bad answers too. Leave `label` out to "
            f"train on all of them. Got {label!r}."
        )


def _parse_field(name: str, text: str) -> Any:
    try:
        return ql.io.files.parse_json(text.encode(), "It") if text.strip() else None
    except ValueError as error:
        raise ValueError(f"`{name}` must be JSON if it is a string. {error}") from error


def to_sequences(
    fields: Fields, is_chat: bool
) -> list[tuple[Text | Conversation, bool | None]]:
    """Returns the normal form of a row: one sequence, or both of a pair.

    Each comes with its label: whether its answer is good, or None for a row without
    preferences. With `is_chat`, prompts and answers that are texts become messages.
    """
    kind, values, _ = fields
    if kind == "text":
        return [(Text(check_text("text", values["text"]), None), None)]
    if kind in ("messages", "sharegpt"):
        name = TEXT_KINDS[kind].required[0]
        return [(to_conversation({name: values[name]}, values), None)]
    if kind == "preference":
        prompt, chosen, rejected = _split_prompt(values)
        # Texts that share a beginning may differ in the middle of a sentence.
        is_chat &= values["prompt"] is not None or not isinstance(chosen, str)
        answers: list[tuple[str, Any, bool | None]]
        answers = [("chosen", chosen, True), ("rejected", rejected, False)]
    elif kind == "alpaca":
        prompt, answer = _alpaca_texts(values, is_chat)
        answers = [("completion", answer, None)]
    else:
        prompt, label = values["prompt"], None
        if kind == "labelled answer":
            label = _LABELS.get(str(values["label"]).lower())
            if label is None:
                raise ValueError(
                    f"`label` must be true or false. Got {values['label']!r:.40}."
                )
        answers = [("completion", values["completion"], label)]
    return [
        (_join_answer(values, prompt, name, answer, is_chat), label)
        for name, answer, label in answers
    ]


def _alpaca_texts(values: Mapping[str, Any], is_chat: bool) -> tuple[str, str]:
    instruction = check_text("instruction", values["instruction"])
    context = check_text("input", values["input"] or "", allow_empty=True)
    output = check_text("output", values["output"])
    if is_chat:
        return f"{instruction}\n{context}" if context else instruction, output
    paired = ", paired with an input that provides further context" if context else ""
    context = f"### Input:\n{context}\n\n" if context else ""
    return ALPACA.format(instruction=instruction, paired=paired, input=context), output


def _split_prompt(values: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    # Returns a prompt and two answers. If a row has no prompt, the longest common
    # beginning of its answers is the prompt.
    prompt, chosen, rejected = (values[x] for x in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text or messages.")
    if chosen == rejected:
        raise ValueError(f"`chosen` and `rejected` must differ. Got {chosen!r:.80}.")
    # Some data sets repeat the prompt as a text, next to messages that contain it.
    repeats_prompt = isinstance(prompt, str) and isinstance(chosen, list)
    if prompt is not None and not repeats_prompt:
        return prompt, chosen, rejected
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
    return shared, chosen[size:], rejected[size:]


def _join_answer(
    values: Mapping[str, Any], prompt: Any, name: str, answer: Any, is_chat: bool
) -> Text | Conversation:
    # `name` is the key of the answer in the row.
    if isinstance(prompt, str) != isinstance(answer, str):
        raise ValueError(f"`prompt` and `{name}` must both be text or messages.")
    if isinstance(prompt, str):
        check_text(name, answer)
        if not is_chat:
            if values.get("tools") or values["system"]:
                raise ValueError(
                    "`tools` and `system` need a chat template. It is applied to texts "
                    "only if `chat` is true, and to pairs of texts only with a "
                    "`prompt`."
                )
            return Text(prompt + answer, len(prompt))
        prompt = [{"role": "user", "content": prompt}]
        answer = [{"role": "assistant", "content": answer}]
    return to_conversation({"prompt": prompt, name: answer}, values)


def to_conversation(groups: dict[str, Any], values: Mapping[str, Any]) -> Conversation:
    """Checks messages from JSON, and adds the system message and the tools of a row."""
    tools, system = values.get("tools") or None, values["system"]
    if tools and not (
        isinstance(tools, list) and all(isinstance(x, dict) for x in tools)
    ):
        raise ValueError(f"`tools` must be a list of objects. Got {tools!r:.40}.")
    if system:
        content = check_text("system", system)
        groups = {"system": [{"role": "system", "content": content}], **groups}
    start, weights = 0, []
    for key, turns in groups.items():
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"`{key}` must be a list of messages. Got {turns!r:.40}.")
        start = len(weights) if "prompt" in groups else 0
        pairs = [_to_message(f"{key}[{index}]", x) for index, x in enumerate(turns)]
        groups[key] = [message for message, _ in pairs]
        weights += [weight for _, weight in pairs]
    skipped = [index for index, weight in enumerate(weights) if weight == 0]
    conversation = Conversation(groups, tools, start, skipped)
    if system and conversation.messages[1]["role"] == "system":
        raise ValueError("the row must not have both `system` and a system message.")
    return conversation


def _to_message(name: str, turn: Any) -> tuple[Message, int]:
    """Checks a message from JSON. Also returns its weight: 0 not to train on it, or 1.

    Turns of ShareGPT have `from` and `value` instead of `role` and `content`.
    """
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
            raise ValueError(
                f"`{name}` must be from one of {', '.join(_SHAREGPT_ROLES)}. Got "
                f"{turn['from']!r:.40}."
            )
        message = {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
        turn = message | {k: x for k, x in turn.items() if k not in ("from", "value")}
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError(f"`{name}` must be an object with a `role`. Got {turn!r:.40}.")
    _check_content(name, turn)
    weights = {key: turn[key] for key in _TRAIN_KEYS if turn.get(key) is not None}
    weight, *others = weights.values() or [1]
    if weight not in (0, 1) or any(x != weight for x in others):
        raise ValueError(
            f"`{name}` must have a `weight` of 0 or 1, or a `train` of false or true. "
            f"Got {weights}."
        )
    if weights and weight and turn["role"] != "assistant":
        raise ValueError(
            f"`{name}` must not have a `weight` of 1 or `train: true`: only messages "
            f"of the assistant are trained. Got {weights} and {turn['role']!r}."
        )
    message = {key: x for key, x in turn.items() if key not in _TRAIN_KEYS}
    # Templates that expect texts would write a list as Python or JSON code.
    if isinstance(message.get("content"), list):
        message["content"] = "".join(part["text"] for part in message["content"])
    return message, int(weight)


def _check_content(name: str, message: Message) -> None:
    content, calls = message.get("content"), message.get("tool_calls") or []
    if not isinstance(content, str | list | None):
        raise ValueError(f"`{name}` must have text as content. Got {content!r:.40}.")
    for part in content if isinstance(content, list) else ():
        # Data sets fill missing fields with None.
        fields = part if isinstance(part, dict) else {}
        keys = {key for key, value in fields.items() if value is not None}
        if keys != {"type", "text"} or not isinstance(fields["text"], str):
            raise ValueError(
                f'`{name}` must have parts {{"type": "text", "text": ...}}. Got '
                f"{part!r:.60}."
            )
    # Some data sets write the name and the arguments into the call itself.
    if not isinstance(calls, list) or not all(
        isinstance(x, dict) and isinstance(x.get("function", {}), dict) for x in calls
    ):
        raise ValueError(
            f"`{name}.tool_calls` must be a list of objects. If one has a "
            f"`function`, it must be an object. Got {calls!r:.40}."
        )
    # An empty user turn may be intended. In an empty answer, the only target would be
    # the token that ends it.
    texts = [x["text"] for x in content] if isinstance(content, list) else [content]
    has_content = any(text and text.strip() for text in texts)
    if not (has_content or calls) and (
        message["role"] == "assistant" or content is None
    ):
        raise ValueError(f"`{name}` must have content. Got {message}.")


def check_text(name: str, value: object, *, allow_empty: bool = False) -> str:
    """Returns `value`, after checking that it is a string and not empty."""
    if not isinstance(value, str) or not (value or allow_empty):
        raise ValueError(f"`{name}` must be text. Got {value!r:.40}.")
    return value
