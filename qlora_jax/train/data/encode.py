"""Turns rows into tokens and labels."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .chat_tokenizer import Tokenizer, encode_text
from .kinds import (
    KINDS,
    LABELLED,
    PAIRS,
    Fields,
    check_keys,
    check_text,
    find_fields,
    find_messages,
    split_trained,
)
from .model_files import ModelError
from .preferences import find_answers, kinds_for
from .templates import Marked
from .written import check_written

IGNORED = -100  # the label of a token that is not trained, as in PyTorch


class Row(NamedTuple):
    """One sequence.

    Attributes:
        ids: Its tokens, int32 `[T]`.
        labels: For each token, the id to predict there, or -100 if it is not trained.
            The first is never trained: no token comes before it.
        place: Its source, such as "train.jsonl:17".
        start: For preferences: where its answer begins.
        label: For preferences: whether the answer is a good one; else None.
        rejected: For pairs: the row of the answer that is not chosen.

    Example:
        >>> row = Row(np.array([3, 1, 2]), np.array([-100, 1, 2]), "train.jsonl:17")
        >>> row.num_trained
        2
    """

    ids: np.ndarray
    labels: np.ndarray
    place: str
    start: int = 0
    label: bool | None = None
    rejected: "Row | None" = None

    @property
    def num_trained(self) -> int:
        """The number of trained tokens."""
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def sequences(self) -> "tuple[Row, ...]":
        """The row, or the two of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def longest(self) -> int:
        """The most tokens of its sequences."""
        return max(len(row.ids) for row in self.sequences)

    @property
    def is_trained(self) -> bool:
        """Whether each sequence has trained tokens, and pairs differ."""
        parts = [x.labels[max(x.start, 1) :] for x in self.sequences]
        is_tie = self.rejected and np.array_equal(self.ids, self.rejected.ids)
        return not is_tie and all((x != IGNORED).any() for x in parts)

    def truncated(self, size: int) -> "Row":
        """Returns the row with fewer tokens.

        Args:
            size: The most tokens of a sequence.
        """
        rejected = self.rejected and self.rejected.truncated(size)
        ids, labels = self.ids[:size], self.labels[:size]
        return self._replace(ids=ids, labels=labels, rejected=rejected)


class Example(NamedTuple):
    """A prompt and the right answer.

    Attributes:
        prompt: The tokens before the answer.
        answer: The text that the model should write.
        end_ids: The tokens that end an answer.

    Example:
        >>> Example([5, 6], "four", (2,)).answer
        'four'
    """

    prompt: list[int]
    answer: str
    end_ids: tuple[int, ...]


class Encoded(NamedTuple):
    """A row, and its last answer if examples are wanted."""

    row: Row
    example: Example | None = None
    straddles: bool = False  # a token holds the end of a prompt and part of its answer


class _Tokens(NamedTuple):
    """Tokens, and the characters of the text that each covers."""

    ids: list[int]
    starts: np.ndarray  # with the white space that the tokenizer leaves out before it
    ends: np.ndarray
    added: np.ndarray  # whether the tokenizer added it: no text stands for it


class Encoder:
    """Turns rows into tokens; its settings are those of `read_dataset`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        train_on: str = "completions",
        keys: Mapping[str, str] | None = None,
        chat: bool = True,
        ends_text: bool = True,
        objective: str = "sft",
    ):
        """Without `ends_text`, rows of `text` get no token for the end."""
        if train_on not in ("completions", "last", "all"):
            raise ValueError(
                f'`train_on` must be "completions", "last" or "all". Got {train_on!r}.'
            )
        self.tokenizer, self.vocab_size, self.train_on = tokenizer, vocab_size, train_on
        self.kinds, self.chat, self.ends_text = kinds_for(objective), chat, ends_text
        self.keys = check_keys(keys, self.kinds)
        self.unused: dict[str, None] = {}  # keys of rows that are not used

    def encode(
        self, raw: Mapping[str, Any], kind: str | None, place: str, examples: bool
    ) -> tuple[str, Encoded]:
        """Returns the kind of a row, which must be `kind` if given, and the row."""
        fields = find_fields(raw, self.keys, self.kinds)
        if kind not in (None, fields.kind):
            raise ValueError(
                f"it must be of the kind of the first row, {kind}. Got {fields.kind}."
            )
        self.unused |= dict.fromkeys(fields.unused)
        if fields.kind == "input_ids":
            return fields.kind, Encoded(self._given(fields, place))
        if fields.kind == "text":
            return fields.kind, Encoded(self._text(fields, place))
        if fields.kind in PAIRS | LABELLED:
            return fields.kind, self._preference(fields, place, examples)
        return fields.kind, self._encoded(fields, place, examples)

    def _given(self, fields: Fields, place: str) -> Row:
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

    def _preference(self, fields: Fields, place: str, examples: bool) -> Encoded:
        found = []
        for name, is_good, answer in find_answers(fields):
            try:
                one = self._encoded(answer, place, examples and is_good)
            except ModelError:
                raise
            except ValueError as error:
                raise ValueError(str(error).replace("completion", name)) from error
            found.append(one._replace(row=one.row._replace(label=is_good)))
        first, *other = found
        row = first.row._replace(rejected=other[0].row if other else None)
        if not row.is_trained:
            raise ValueError(
                "its answers must have tokens, and those of a pair must differ."
            )
        straddles = any(one.straddles for one in found)
        return first._replace(row=row, straddles=straddles)

    def _marked(self, fields: Fields) -> Marked:
        # A text that is cut in two is no message.
        is_chat = self.chat and self.tokenizer.has_template and fields.kind != "text"
        found = find_messages(fields, is_chat)
        if isinstance(found, tuple):
            text = "".join(found)
            return Marked(text, [(len(found[0]), len(text))], False)
        chat, tools = self.tokenizer.chat, found.pop("tools")
        chat.check_roles(found, tools)
        split = {
            name: [split_trained(f"{name}[{i}]", m) for i, m in enumerate(found[name])]
            for name in found
        }
        found = {name: [message for message, _ in split[name]] for name in split}
        may_train = [is_trained for name in split for _, is_trained in split[name]]
        if self.train_on == "all" and not all(may_train):
            raise ValueError(
                "messages must not have a `weight` of 0 or `train: false` where all "
                "tokens are trained (`train_on`)."
            )
        messages = lambda row: [m for name in row if name != "tools" for m in row[name]]
        readable = iter(chat.readable(messages(found), tools))
        row: dict[str, Any] = {n: [next(readable) for _ in found[n]] for n in found}
        turns = self._trained_turns(row, may_train)
        row["tools"] = tools
        render = lambda row: chat.render(messages(row), row.get("tools"))
        rendering = render(row)
        source = chat.template(tools).source
        check_written(lambda row: render(row).text, row, rendering.text, source)
        try:
            return chat.mark(rendering, messages(row), turns, tools)
        except ModelError:
            raise
        except ValueError:
            if self.train_on != "all" or self.kinds is not KINDS:
                raise
        return Marked(rendering.text, [], True)  # where the answers are is no matter

    def _trained_turns(
        self, row: Mapping[str, Any], may_train: list[bool]
    ) -> list[int]:
        """Returns the indices of the messages to train on, among all of a row."""
        messages = [message for part in row.values() for message in part]
        first = len(messages) - len(row.get("completion", messages))
        turns = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index >= first
        ]
        turns = turns[-1:] if self.train_on == "last" else turns
        return [turn for turn in turns if may_train[turn]]

    def _encoded(self, fields: Fields, place: str, examples: bool) -> Encoded:
        marked = self._marked(fields)
        tokens = self._tokens(marked.text, marked.rendered)
        trained, answer, straddles = self._find_trained(tokens, marked)
        ids = [*tokens.ids]
        if not marked.rendered:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise ModelError("the model must name a token that ends a text.")
            if ids[-1:] != [eos]:
                ids, trained = [*ids, eos], np.append(trained, True)
        ids = self._ids(f"the ids of its {fields.kind}", ids)
        labels = np.where(trained, ids, IGNORED).astype(np.int32)
        if self.train_on == "all":
            labels = ids
        is_example = examples and marked.answers
        example = self._example(marked, answer) if is_example else None
        start = 0 if self.kinds is KINDS else int(trained.argmax())
        return Encoded(Row(ids, labels, place, start), example, straddles)

    def _tokens(self, text: str, rendered: bool) -> _Tokens:
        found = encode_text(self.tokenizer.inner, text, not rendered)
        starts, ends, added, last = [], [], [], 0
        covered = zip(found.special_tokens_mask, found.offsets, strict=True)
        for special, (start, end) in covered:
            added.append(bool(special) and start == end)
            starts.append(last if added[-1] else min(start, last))
            last = last if added[-1] else max(last, end)
            ends.append(last)
        added = np.array(added, bool)
        return _Tokens(found.ids, np.array(starts), np.array(ends), added)

    def _find_trained(
        self, tokens: _Tokens, marked: Marked
    ) -> tuple[np.ndarray, list[int], bool]:
        """Returns the trained tokens' mask, the last answer, and any straddling."""
        ids, starts, ends, added = tokens
        trained, straddles = np.zeros(len(ids), bool), False
        stops = self.tokenizer.end_ids if marked.rendered else ()
        inside = np.zeros(0, int)
        for start, end in marked.answers:
            holds = (starts < end) & (ends > start) & ~added
            holds |= added & (starts > start)  # a token for the end of the text
            (inside,) = np.nonzero(holds)
            # Text after the token that ends an answer is not trained.
            stopping = [i for i in inside if ids[i] in stops]
            inside = inside[inside <= stopping[-1]] if stopping else inside
            trained[inside] = True
            straddles |= bool(len(inside)) and bool(starts[inside[0]] < start)
        return trained, [ids[i] for i in inside], straddles

    def _example(self, marked: Marked, answer: list[int]) -> Example:
        start, _ = marked.answers[-1]
        prompt = self._tokens(marked.text[:start], marked.rendered)
        ids = [*prompt.ids]
        while len(ids) > 1 and prompt.added[len(ids) - 1]:
            ids.pop()  # a token for the end
        end_ids = self.tokenizer.end_ids
        answer = [x for x in answer if x not in end_ids]
        return Example(ids, self.tokenizer.decode(answer), end_ids)

    def _ids(self, name: str, values: Any, *, ignored: bool = False) -> np.ndarray:
        size = self.vocab_size
        allowed = (IGNORED,) if ignored else ()
        is_id = lambda x: type(x) is int and (0 <= x < size or x in allowed)
        wrong = [values]
        if isinstance(values, list):
            wrong = [x for x in values if not is_id(x)]
        if wrong:
            raise ValueError(
                f"{name} must be a list of integers below {size}. Got {wrong[0]!r:.40}."
            )
        if not values:
            raise ValueError("it must have at least one token. Got none.")
        return np.asarray(values, np.int32)
