"""Turns raw rows into tokens and labels."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from ..reading import ModelError
from . import kinds
from .chat_tokenizer import AnswerSpans, Tokenizer, encode_with_offsets
from .kinds import Conversation, Text, TrainOn
from .omissions import check_nothing_omitted

IGNORED = -100  # the label of a token that is not a target, as in PyTorch


class Row(NamedTuple):
    """One sequence; or a pair of sequences, of which `rejected` is the second.

    Attributes:
        ids: The tokens, int32 `[T]`.
        labels: For each position, the id that the model should predict from the tokens
            before it, or -100 if the position is not a target. The first position is
            never a target, since no token precedes it.
        place: The source of the row, such as "train.jsonl:17".
        start: For preferences: the index of the first token of the completion.
        label: For preferences: whether the completion is a good one; otherwise None.
        rejected: For pairs: the row of the rejected completion. The other fields are
            those of the chosen one.
        uncut: For a preference that `truncated` has cut: the row before the cut.
            Otherwise None.

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
    uncut: "Row | None" = None

    @property
    def num_trained(self) -> int:
        """The number of target tokens. Those of `rejected` are not included."""
        return int((self.labels[1:] != IGNORED).sum())

    @property
    def sequences(self) -> "tuple[Row, ...]":
        """The row, or both rows of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(len(row.ids) for row in self.sequences)

    @property
    def is_trained(self) -> bool:
        """Whether each sequence has a target token in its completion.

        The two sequences of a pair must also differ.
        """
        labels = [row.labels[max(row.start, 1) :] for row in self.sequences]
        is_tie = self.rejected and np.array_equal(self.ids, self.rejected.ids)
        return not is_tie and all((x != IGNORED).any() for x in labels)

    def truncated(self, size: int) -> "Row":
        """Returns the row with at most `size` tokens per sequence.

        Args:
            size: The largest number of tokens.
        """
        rejected = self.rejected and self.rejected.truncated(size)
        # KTO joins the answer to other prompts, after which more of it may fit.
        is_cut = self.label is not None and len(self.ids) > size
        uncut = self if is_cut else self.uncut
        ids, labels = self.ids[:size], self.labels[:size]
        return self._replace(ids=ids, labels=labels, rejected=rejected, uncut=uncut)


class Example(NamedTuple):
    """A prompt and the correct answer.

    Attributes:
        prompt: The tokens before the answer.
        answer: The text that the model should write.
    """

    prompt: list[int]
    answer: str


class Encoded(NamedTuple):
    """A row; and, if the caller asked for it, an example with the row's last answer."""

    row: Row
    example: Example | None = None
    straddles: bool = False  # whether a token covers text of both prompt and answer
    kind: str = ""


class Encoder:
    """Turns raw rows into tokens, with the settings of `read_dataset`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        train_on: TrainOn = "completions",
        keys: Mapping[str, str] | None = None,
        chat: bool = True,
        ends_text: bool = True,
        rows: str = "texts",
    ):
        """Checks and stores the settings.

        With `ends_text`, an end token is added to rows of `text`. `rows` is a key of
        `kinds.FORMS`.
        """
        if train_on not in get_args(TrainOn):
            raise ValueError(
                f'`train_on` must be "completions", "last" or "all". Got {train_on!r}.'
            )
        self.tokenizer, self.vocab_size, self.train_on = tokenizer, vocab_size, train_on
        self.makes_messages, self.ends_text = chat, ends_text
        self.kinds = kinds.FORMS[rows]
        self.keys = kinds.check_keys(keys, self.kinds)
        self.kind_of: dict[str, str] = {}  # the kind of the rows of each file
        self.unused: dict[str, None] = {}  # the unused keys so far, in order
        # The first messages of conversations so far: the text of a system message, or
        # None if there is none.
        self.system_messages: set[str | None] = set()

    def encode(
        self, raw: Mapping[str, Any], file: str, number: int, with_example: bool
    ) -> Encoded:
        """Returns the tokens of a row. All rows of a file must have the same kind."""
        fields = kinds.find_fields(raw, self.keys, self.kinds)
        place = f"{file}:{number}"
        if (kind := self.kind_of.setdefault(file, fields.kind)) != fields.kind:
            raise ValueError(
                f"the row must be of the kind of the first row, {kind}. Got "
                f"{fields.kind}."
            )
        self.unused |= dict.fromkeys(fields.unused)  # for a note after the last row
        if fields.kind == "input_ids":
            row = self._take_ids(fields.values, place)
            return Encoded(row, kind=fields.kind)
        is_text = fields.kind == "text"
        is_chat = not is_text and self.makes_messages and self.tokenizer.has_template
        first, *second = [
            self._encode_sequence(sequence, label, place, with_example)
            for sequence, label in kinds.to_sequences(fields, is_chat)
        ]
        row = first.row._replace(rejected=second[0].row if second else None)
        straddles = any(x.straddles for x in (first, *second))
        if row.label is not None and not row.is_trained:
            raise ValueError(
                "the answers must have tokens, and those of a pair must differ."
            )
        return Encoded(row, first.example, straddles, fields.kind)

    def _take_ids(self, values: Mapping[str, Any], place: str) -> Row:
        ids, labels = values["input_ids"], values["labels"]
        self._check_ids("input_ids", ids)
        if labels is None:
            labels = ids
        self._check_ids("labels", labels, (IGNORED,))
        if len(labels) != len(ids):
            raise ValueError(f"the row must have {len(ids)} labels. Got {len(labels)}.")
        return Row(np.asarray(ids, np.int32), np.asarray(labels, np.int32), place)

    def _encode_sequence(
        self,
        sequence: Text | Conversation,
        label: bool | None,
        place: str,
        with_example: bool,
    ) -> Encoded:
        if isinstance(sequence, Conversation):
            located = self._render(sequence, label)
        elif sequence.start is None:
            return self._encode_text(sequence.text, place)
        else:
            self.system_messages.add(None)
            answer = (sequence.start, len(sequence.text))
            located = AnswerSpans(sequence.text, [answer], False)
        # The text is tokenized as a whole, because tokenizing its parts separately can
        # give different tokens. Answers are found in it by their characters.
        encoding = encode_with_offsets(
            self.tokenizer, located.text, not located.is_rendered
        )
        is_answer, last_answer, straddles = self._find_targets(encoding, located)
        ids = encoding.ids
        # Without a chat template, nothing ends the answer.
        if not located.is_rendered:
            eos = self.tokenizer.eos_id
            if eos is None:
                raise ModelError("the model must name a token that ends a text.")
            if ids[-1:] != [eos]:
                ids, is_answer = [*ids, eos], np.append(is_answer, True)
        self._check_ids("the ids of the row", ids)
        ids = np.asarray(ids, np.int32)
        is_target = is_answer | (self.train_on == "all")
        labels = np.where(is_target, ids, IGNORED).astype(np.int32)
        start, example = 0, None
        if label is not None:
            start = int(is_answer.argmax()) if is_answer.any() else len(ids)
        if with_example and label is not False and located.answers:
            example = self._make_example(located, last_answer)
        row = Row(ids, labels, place, start, label)
        return Encoded(row, example, straddles)

    def _encode_text(self, text: str, place: str) -> Encoded:
        ids, eos = self.tokenizer.encode(text), self.tokenizer.eos_id
        if self.ends_text and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)  # some tokenizers have already added it
        self._check_ids("the ids of its text", ids)
        ids = np.asarray(ids, np.int32)
        return Encoded(Row(ids, ids, place))

    def _render(self, conversation: Conversation, label: bool | None) -> AnswerSpans:
        chat, (groups, tools, start, skipped) = self.tokenizer.chat, conversation
        chat.check_roles(groups, tools)
        if self.train_on == "all" and skipped:
            raise ValueError(
                "messages must not have a `weight` of 0 or `train: false` where all "
                "tokens are trained (`train_on`)."
            )
        first, *_ = messages = conversation.messages
        system = first["content"] if first["role"] == "system" else None
        self.system_messages.add(system)
        rendering = chat.render(messages, tools)

        def render_variant(row):
            parts = [group for name, group in row.items() if name != "tools"]
            return chat.render([*itertools.chain(*parts)], row.get("tools")).text

        row, template = groups | {"tools": tools}, chat.template(tools)
        check_nothing_omitted(render_variant, row, rendering.text, template)
        roles = enumerate(message["role"] for message in messages)
        turns = [i for i, role in roles if role == "assistant" and i >= start]
        turns = turns[-1:] if self.train_on == "last" else turns
        turns = [turn for turn in turns if turn not in skipped]
        try:
            return chat.find_answers(rendering, messages, turns, tools)
        except ModelError:
            raise
        except ValueError:
            # With "all", every token is a target, so the answers need not be found.
            # Rows of preferences need them in any case.
            if self.train_on != "all" or label is not None:
                raise
            return AnswerSpans(rendering.text, [], True)

    def _find_targets(
        self, encoding: Any, located: AnswerSpans
    ) -> tuple[np.ndarray, list[int], bool]:
        # Returns which tokens belong to answers, the tokens of the last answer, and
        # whether a token covers both the end of a prompt and the start of its answer.
        ids = encoding.ids
        starts, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
        # Special tokens that are written in the text cover characters. Special tokens
        # that the tokenizer adds do not.
        added = np.array(encoding.special_tokens_mask, bool) & (starts == ends)
        # Some tokenizers give spaces to no token. Move the start of each token back to
        # where the text of the tokens before it ends, so that there are no gaps.
        ends = np.maximum.accumulate(np.where(added, 0, ends))
        covered = np.concatenate([[0], ends])[:-1]
        starts = np.where(added, covered, np.minimum(starts, covered))
        is_answer, straddles = np.zeros(len(ids), bool), False
        end_ids = self.tokenizer.end_ids if located.is_rendered else ()
        indices = np.zeros(0, int)
        for start, end in located.answers:
            is_inside = (starts < end) & (ends > start) & ~added
            # A token that the tokenizer added starts where the text before it ends. If
            # that is after the start of the answer, it is the token for the end of the
            # text, which belongs to the answer.
            is_inside |= added & (starts > start)
            (indices,) = np.nonzero(is_inside)
            # An answer ends at its last end token: earlier ones are inside it, and the
            # text after it comes from the template, once the model has stopped.
            stops = [i for i in indices if ids[i] in end_ids]
            if stops:
                indices = indices[indices <= stops[-1]]
            is_answer[indices] = True
            straddles |= bool(len(indices)) and bool(starts[indices[0]] < start)
        return is_answer, [ids[i] for i in indices], straddles

    def _make_example(self, located: AnswerSpans, answer_ids: list[int]) -> Example:
        start, _ = located.answers[-1]
        # The prompt is tokenized without the answer, as it will be at inference.
        encoding = encode_with_offsets(
            self.tokenizer, located.text[:start], not located.is_rendered
        )
        # Leave out an end token that the tokenizer added, which covers no text.
        ids, special = encoding.ids, encoding.special_tokens_mask
        covers = [start < end for start, end in encoding.offsets]
        while len(ids) > 1 and special[len(ids) - 1] and not covers[len(ids) - 1]:
            ids.pop()
        end_ids = self.tokenizer.end_ids
        text = self.tokenizer.decode([x for x in answer_ids if x not in end_ids])
        return Example(ids, text)

    def _check_ids(self, name: str, ids: Any, others: tuple[int, ...] = ()) -> None:
        allowed, wrong = range(self.vocab_size), [ids]
        if isinstance(ids, list):
            # `type(x) is int` excludes booleans.
            are_ids = (type(x) is int and (x in allowed or x in others) for x in ids)
            wrong = [x for x, is_id in zip(ids, are_ids, strict=True) if not is_id]
        if wrong:
            raise ValueError(
                f"{name} must be a list of integers below {self.vocab_size}. Got "
                f"{wrong[0]!r:.40}."
            )
        if not ids:
            raise ValueError("the row must have at least one token. Got none.")
