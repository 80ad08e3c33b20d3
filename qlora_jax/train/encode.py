"""Rows as tokens, and which of them are trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .kinds import (
    KINDS,
    Fields,
    alpaca_prompt,
    check_keys,
    check_messages,
    check_text,
    check_tools,
    find_fields,
    from_sharegpt,
)
from .model_files import ModelError
from .places import Spans, token_spans
from .records import IGNORED, Example, Row
from .templates import Tokenizer
from .turns import Spoken, find_answers, joined
from .written import check_written


class Encoded(NamedTuple):
    """A row with what else is known of it.

    Attributes:
        row: Its tokens.
        example: Its last answer; None where it has none, or none was asked for.
        straddles: Whether a token holds the end of a prompt and the beginning of its
            answer.
    """

    row: Row
    example: Example | None = None
    straddles: bool = False


class Encoder:
    """Turns rows into tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        train_on: str = "completions",
        keys: Mapping[str, str] | None = None,
        chat: bool = True,
        ends_text: bool = True,
    ):
        """Takes the settings, as `read_dataset` does.

        Args:
            tokenizer: The model's.
            vocab_size: Ids must be below.
            train_on: "completions" or "all".
            keys: Other names of keys.
            chat: Whether prompts become messages where there is a template.
            ends_text: Whether rows of `text` get a token for the end.
        """
        if train_on not in ("completions", "all"):
            raise ValueError(
                f'`train_on` must be "completions" or "all". Got {train_on!r}.'
            )
        self.tokenizer, self.vocab_size, self.train_on = tokenizer, vocab_size, train_on
        self.keys, self.chat, self.ends_text = check_keys(keys), chat, ends_text
        self.unused: dict[str, None] = {}  # keys of rows that are not used

    def encode(
        self, raw: Mapping[str, Any], kind: str | None, place: str, examples: bool
    ) -> tuple[str, Encoded]:
        """Encodes a row.

        Args:
            raw: The row.
            kind: The kind it must be of; any where None.
            place: Where it comes from.
            examples: Whether to make an `Example`.

        Returns:
            Its kind, and the row encoded.

        Raises:
            ValueError: If the row is wrong.
        """
        fields = find_fields(raw, self.keys)
        if kind not in (None, fields.kind):
            raise ValueError(
                f"it must be of the kind of the first row, {kind}. Got {fields.kind}."
            )
        self.unused |= dict.fromkeys(fields.unused)
        if fields.kind == "input_ids":
            return fields.kind, Encoded(self._taken(fields, place))
        if fields.kind == "text":
            return fields.kind, Encoded(self._text(fields, place))
        spoken = self._spoken(fields)
        return fields.kind, self._encoded(fields.kind, spoken, place, examples)

    def _taken(self, fields: Fields, place: str) -> Row:
        ids = self._ids("input_ids", fields.values["input_ids"])
        labels = ids
        if fields.values["labels"] is not None:
            labels = self._ids("labels", fields.values["labels"], ignored=True)
        if len(labels) != len(ids):
            raise ValueError(f"it must have {len(ids)} labels. Got {len(labels)}.")
        return Row(ids, labels, place)

    def _text(self, fields: Fields, place: str) -> Row:
        ids = self.tokenizer.encode(check_text("text", fields.values["text"]))
        eos = self.tokenizer.eos_id
        if self.ends_text and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        ids = self._ids("the ids of its text", ids)
        return Row(ids, ids, place)

    def _spoken(self, fields: Fields) -> Spoken:
        kind, values, _ = fields
        tools = check_tools(values.get("tools"))
        row: dict[str, Any] = {}  # messages by the names that errors give them
        if values["system"]:
            text = check_text("system", values["system"])
            row["system"] = [{"role": "system", "content": text}]
        if kind in ("messages", "sharegpt"):
            name = KINDS[kind].needed[0]
            row[name] = check_messages(name, from_sharegpt(name, values[name]))
            return self._conversation(row, 0, tools)
        is_chat = self.chat and self.tokenizer.has_template
        prompt, completion = self._pair(kind, values, is_chat)
        if isinstance(prompt, str) and isinstance(completion, str):
            if not is_chat:
                if tools or row:
                    raise ValueError("`tools` and `system` need a chat template.")
                return joined(prompt, completion)
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        elif isinstance(prompt, str) or isinstance(completion, str):
            raise ValueError("`prompt` and `completion` must both be text or messages.")
        row["prompt"] = check_messages("prompt", prompt)
        first = sum(map(len, row.values()))
        row["completion"] = check_messages("completion", completion)
        return self._conversation(row, first, tools)

    def _pair(self, kind: str, values: dict, is_chat: bool) -> tuple[Any, Any]:
        """Returns a prompt and a completion; both may be messages."""
        if kind != "alpaca":
            prompt, completion = values["prompt"], values["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                check_text("completion", completion)
            return prompt, completion
        prompt = check_text("instruction", values["instruction"])
        given = check_text("input", values["input"] or "", empty=True)
        completion = check_text("output", values["output"])
        if not is_chat:
            return alpaca_prompt(prompt, given), completion
        return f"{prompt}\n{given}" if given else prompt, completion

    def _conversation(self, row: dict[str, Any], first: int, tools: Any) -> Spoken:
        """Finds the answers in messages, of which those before `first` have none."""
        chat, rest = self.tokenizer.chat, [m for name in row for m in row[name]]
        if "system" in row and rest[1]["role"] == "system":
            raise ValueError("it must not have both `system` and a message of one.")
        messages = lambda row: [m for name in row if name != "tools" for m in row[name]]
        spoken = iter(chat.readable(messages(row), tools))
        row = {name: [next(spoken) for _ in row[name]] for name in row}
        row["tools"] = tools
        render = lambda row: chat.render(messages(row), row.get("tools"))
        rendering = render(row)
        source = chat.template(tools).source
        check_written(lambda row: render(row).text, row, rendering.text, source)
        try:
            return find_answers(self.tokenizer, rendering, messages(row), first, tools)
        except ModelError:
            raise
        except ValueError:
            if self.train_on != "all":
                raise
        return Spoken(rendering.text, [], True)  # where the answers are is no matter

    def _encoded(
        self, kind: str, spoken: Spoken, place: str, examples: bool
    ) -> Encoded:
        plain = not spoken.rendered
        found = token_spans(self.tokenizer, spoken.text, add_special_tokens=plain)
        trained, answer, straddles = self._find_trained(found, spoken)
        ids = [*found.ids]
        if plain:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise ModelError("the model must name a token that ends a text.")
            if ids[-1:] != [eos]:
                ids, trained = [*ids, eos], np.append(trained, True)
        ids = self._ids(f"the ids of its {kind}", ids)
        labels = np.where(trained, ids, IGNORED).astype(np.int32)
        if self.train_on == "all":
            labels = ids
        example = None
        if examples and spoken.answers:
            example = self._example(spoken, answer)
        return Encoded(Row(ids, labels, place), example, straddles)

    def _find_trained(
        self, found: Spans, spoken: Spoken
    ) -> tuple[np.ndarray, list[int], bool]:
        """Finds the tokens that hold a character of an answer.

        What a template writes behind the token that ends an answer does not count.

        Returns:
            Which tokens do, those of the last answer, and whether one of them holds
            characters before its answer too.
        """
        trained, straddles = np.zeros(len(found.ids), bool), False
        starts, ends = np.array(found.starts), np.array(found.ends)
        added = np.array(found.added, bool)
        stops = self.tokenizer.end_ids if spoken.rendered else ()
        inside = np.zeros(0, int)
        for start, end in spoken.answers:
            holds = (starts < end) & (ends > start) & ~added
            holds |= added & (starts > start)  # a token for the end of the text
            (inside,) = np.nonzero(holds)
            stopping = [i for i in inside if found.ids[i] in stops]
            inside = inside[inside <= stopping[-1]] if stopping else inside
            trained[inside] = True
            straddles |= bool(len(inside)) and bool(starts[inside[0]] < start)
        return trained, [found.ids[i] for i in inside], straddles

    def _example(self, spoken: Spoken, answer: list[int]) -> Example:
        start, _ = spoken.answers[-1]
        plain = not spoken.rendered
        prompt = token_spans(
            self.tokenizer, spoken.text[:start], add_special_tokens=plain
        )
        ids = [*prompt.ids]
        while len(ids) > 1 and prompt.added[len(ids) - 1]:
            ids.pop()  # a token for the end
        end_ids = self.tokenizer.end_ids
        answer = [x for x in answer if x not in end_ids]
        return Example(ids, self.tokenizer.decode(answer), end_ids)

    def _ids(self, name: str, values: Any, *, ignored: bool = False) -> np.ndarray:
        size = self.vocab_size
        is_id = lambda x: (
            type(x) is int and (0 <= x < size or (ignored and x == IGNORED))
        )
        if not isinstance(values, list) or not all(map(is_id, values)):
            wrong = values
            if isinstance(values, list):
                wrong = next(x for x in values if not is_id(x))
            raise ValueError(
                f"{name} must be a list of integers below {size}. Got {wrong!r:.40}."
            )
        if not values:
            raise ValueError("it must have at least one token. Got none.")
        return np.asarray(values, np.int32)
