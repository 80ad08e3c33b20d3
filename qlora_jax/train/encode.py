"""Rows as tokens, and which of them are trained."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .kinds import (
    alpaca_prompt,
    check_keys,
    check_messages,
    check_text,
    check_tools,
    find_fields,
)
from .rows import Problems, Source, find_sources, jsonl, listing
from .spoken import Spoken, find_answers
from .templates import Tokenizer

IGNORED = -100  # the label of a token that does not count, as in PyTorch


class Row(NamedTuple):
    """One sequence.

    Attributes:
        ids: Its tokens, int32 `[T]`.
        labels: For each token, the id that the model should have predicted there, or
            -100 where it does not count; the first is predicted by none and never
            counts.
        place: Where it comes from, such as "train.jsonl:17".

    Example:
        >>> row = Row(np.array([3, 1, 2]), np.array([-100, 1, 2]), "train.jsonl:17")
        >>> row.num_trained
        2
    """

    ids: np.ndarray
    labels: np.ndarray
    place: str = ""

    @property
    def num_trained(self) -> int:
        """How many tokens count."""
        return int((self.labels[1:] != IGNORED).sum())


class Example(NamedTuple):
    """A prompt and the right answer.

    Attributes:
        prompt: The tokens up to where the answer starts.
        answer: The text that the model should write.
        end_ids: The tokens that end an answer.

    Example:
        >>> Example([5, 6], "four", (2,)).answer
        'four'
    """

    prompt: list[int]
    answer: str
    end_ids: tuple[int, ...]


class Dataset(NamedTuple):
    """Rows of a data set, by split.

    Attributes:
        train: Rows to train on.
        valid: Rows to validate on; may be empty.
        test: Rows to test on; may be empty.
        valid_examples: Prompts and answers of `valid`, where its rows have some.
        test_examples: Those of `test`.
        trained_share: The share of the tokens in `train` that count.
        kind: The kind of the rows: "input_ids", "messages", "prompt/completion",
            "alpaca" or "text".
        notes: What a user should know, a line each.
        digest: SHA-256 of the tokens and labels of all splits.

    Example:
        >>> Dataset([], [], [], [], [], 0.4, "messages", (), "").kind
        'messages'
    """

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    valid_examples: list[Example]
    test_examples: list[Example]
    trained_share: float
    kind: str
    notes: tuple[str, ...] = ()
    digest: str = ""


class _Encoded(NamedTuple):
    row: Row
    example: Example | None
    straddles: bool


class Encoder:
    """Turns the rows of one split into tokens."""

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
        if train_on not in ("completions", "all"):
            raise ValueError(
                f'`train_on` must be "completions" or "all". Got {train_on!r}.'
            )
        self.tokenizer, self.vocab_size, self.train_on = tokenizer, vocab_size, train_on
        self.keys, self.chat, self.ends_text = check_keys(keys), chat, ends_text

    def encode(self, raw: Mapping[str, Any], kind: str | None, place: str) -> tuple:
        """Returns a row's kind, and the row encoded."""
        fields = find_fields(raw, self.keys)
        if kind is not None and fields.kind != kind:
            raise ValueError(
                f"it must be of the kind of the first row, {kind}. Got {fields.kind}."
            )
        if fields.kind == "input_ids":
            row = self._taken(fields.values, place)
            return fields.kind, _Encoded(row, None, False)
        spoken = self._spoken(fields.kind, fields.values)
        return fields.kind, self._tokens(fields.kind, spoken, place)

    def _taken(self, values: Mapping[str, Any], place: str) -> Row:
        ids = _ids("input_ids", values["input_ids"], self.vocab_size)
        if not len(ids):
            raise ValueError("it must have at least one token. Got none.")
        labels = ids
        if values["labels"] is not None:
            labels = _ids("labels", values["labels"], self.vocab_size, ignored=True)
        if len(labels) != len(ids):
            raise ValueError(f"it must have {len(ids)} labels. Got {len(labels)}.")
        return Row(ids, labels, place)

    def _spoken(self, kind: str, values: Mapping[str, Any]) -> Spoken:
        if kind == "text":
            return Spoken.of_text("", check_text("text", values["text"], empty=True))
        if kind == "messages":
            messages = check_messages("messages", values["messages"])
            return find_answers(
                self.tokenizer, [], messages, check_tools(values["tools"])
            )
        is_chat = self.chat and self.tokenizer.has_template
        if kind == "alpaca":
            instruction = check_text("instruction", values["instruction"])
            given = check_text("input", values["input"] or "", empty=True)
            completion: Any = check_text("output", values["output"])
            prompt: Any = alpaca_prompt(instruction, given)
            if is_chat:
                prompt = f"{instruction}\n{given}" if given else instruction
            tools = None
        else:
            prompt, completion = values["prompt"], values["completion"]
            tools = check_tools(values["tools"])
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(
                "`prompt` and `completion` must both be text, or both messages."
            )
        if isinstance(prompt, str):
            check_text("completion", completion)
            if not is_chat:
                return Spoken.of_text(prompt, completion)
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        prompt = check_messages("prompt", prompt)
        completion = check_messages("completion", completion)
        return find_answers(self.tokenizer, prompt, completion, tools)

    def _tokens(self, kind: str, spoken: Spoken, place: str) -> _Encoded:
        tokenizer, plain = self.tokenizer, not spoken.rendered
        found = tokenizer.spans(spoken.text, add_special_tokens=plain)
        ids = found.ids
        ends = set(() if plain else tokenizer.end_ids)
        trained, straddles = np.zeros(len(ids), bool), False
        for start, end in spoken.answers:
            inside = [
                i
                for i, (a, b) in enumerate(zip(found.starts, found.ends, strict=True))
                if (a < end and b > start) or (found.added[i] and a > start)
            ]
            last = max((i for i in inside if ids[i] in ends), default=None)
            trained[[i for i in inside if last is None or i <= last]] = True
            straddles |= bool(inside) and found.starts[inside[0]] < start
        if plain and (kind != "text" or self.ends_text):
            if tokenizer.eos_id is None and kind != "text":
                raise ValueError("the model must name a token that ends a text.")
            if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
                ids, trained = [*ids, tokenizer.eos_id], np.append(trained, True)
        if not ids:
            raise ValueError("it must have at least one token. Got none.")
        ids = _ids(f"the ids of its {kind}", [*ids], self.vocab_size)
        labels = np.where(trained, ids, IGNORED).astype(np.int32)
        if kind == "text" or self.train_on == "all":
            labels = ids
        example = None if kind == "text" else self._example(spoken, ids, trained, found)
        return _Encoded(Row(ids, labels, place), example, straddles and kind != "text")

    def _example(self, spoken, ids, trained, found) -> Example | None:
        start, _ = spoken.answers[-1]
        text, plain = spoken.text[:start], not spoken.rendered
        prompt = self.tokenizer.encode(text, add_special_tokens=plain)
        end_ids = self.tokenizer.end_ids
        first = next((i for i, b in enumerate(found.ends) if b > start), len(found.ids))
        answer = [int(x) for x, t in zip(ids, trained, strict=True)][first:]
        kept = trained[first:]
        answer = [
            x for x, t in zip(answer, kept, strict=True) if t and x not in end_ids
        ]
        return Example(prompt, self.tokenizer.decode(answer), end_ids)


def _ids(
    name: str, values: Any, vocab_size: int, *, ignored: bool = False
) -> np.ndarray:
    is_id = lambda x: (
        type(x) is int and (0 <= x < vocab_size or (ignored and x == IGNORED))
    )
    if not isinstance(values, list) or not all(map(is_id, values)):
        wrong = values if not isinstance(values, list) else None
        if wrong is None:
            wrong = next(x for x in values if not is_id(x))
        raise ValueError(
            f"{name} must be a list of integers below {vocab_size}. Got {wrong!r:.40}."
        )
    return np.asarray(values, np.int32)


def read_rows(
    path: str | pathlib.Path, tokenizer: Tokenizer, *, vocab_size: int
) -> list[Row]:
    """Reads the rows of one JSONL file, as they are.

    Args:
        path: The file.
        tokenizer: Turns text into tokens; not used for rows with `input_ids`.
        vocab_size: Ids must be below.

    Returns:
        The rows. A `text` ends where it ends, with no token for that.

    Raises:
        ValueError: If lines are wrong; they are listed.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [3, -100]}')
        >>> [row] = read_rows(path, Tokenizer("folder"), vocab_size=4)
        >>> row.ids.tolist(), row.labels.tolist()
        ([3, 1], [3, -100])
    """
    encoder = Encoder(tokenizer, vocab_size=vocab_size, ends_text=False)
    found, _ = _encode(jsonl(path), encoder)
    return [one.row for one in found]


def _encode(source: Source, encoder: Encoder) -> tuple[list[_Encoded], str]:
    problems, found, kind = Problems(source), [], None
    for number, raw in source.rows:
        try:
            if isinstance(raw, Exception):
                raise raw
            kind, one = encoder.encode(raw, kind, source.place(number))
            found.append(one)
        except (ValueError, RecursionError) as error:
            problems.add(number, error)
    problems.refuse()
    if not found:
        raise ValueError(f"{source.name} must have rows. Got none.")
    return found, kind or ""


def read_dataset(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    keys: Mapping[str, str] | None = None,
    train_on: Literal["completions", "all"] = "completions",
    too_long: Literal["refuse", "drop", "truncate"] = "refuse",
    chat: bool = True,
) -> Dataset:
    """Reads a data set and turns its rows into tokens.

    Args:
        path: A JSONL file, a folder with train.jsonl and perhaps valid.jsonl (or
            validation.jsonl) and test.jsonl, or the id of a data set on the hub.
        tokenizer: The model's.
        vocab_size: Ids must be below.
        max_length: The most tokens of a row.
        keys: What our names of keys are called in the rows, such as
            `{"prompt": "question", "completion": "answer"}`.
        train_on: Which tokens count: those of completions and of the assistant's
            messages, or all. Rows of `text` count whole, and those of `input_ids` as
            their `labels` say.
        too_long: What to do with a row of more tokens than `max_length`.
        chat: Whether prompts and completions that are texts, and Alpaca's rows, become
            messages of a user and an assistant where the model has a chat template.

    Returns:
        The rows and what is known of them.

    Raises:
        ValueError: If a file cannot be read, or rows are wrong, too long or without a
            token that counts; they are listed.
        ImportError: If a library is missing that the data needs.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [-100, 1]}')
        >>> data = read_dataset(path, Tokenizer("folder"), vocab_size=4, max_length=8)
        >>> data.kind, data.trained_share
        ('input_ids', 0.5)
    """
    if too_long not in ("refuse", "drop", "truncate"):
        raise ValueError(
            f'`too_long` must be "refuse", "drop" or "truncate". Got {too_long!r}.'
        )
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2. Got {max_length}.")
    encoder = Encoder(
        tokenizer, vocab_size=vocab_size, train_on=train_on, keys=keys, chat=chat
    )
    kinds, splits, notes = {}, {}, []
    for split, source in find_sources(path).items():
        found, kinds[split] = _encode(source, encoder)
        splits[split] = _shortened(source, found, max_length, too_long, notes)
        _check_trained(source, splits[split])
    if len(set(kinds.values())) > 1:
        raise ValueError(f"all splits must have rows of one kind. Got {kinds}.")
    rows = {
        s: [one.row for one in splits.get(s, [])] for s in ("train", "valid", "test")
    }
    examples = [
        [one.example for one in splits.get(s, []) if one.example is not None]
        for s in ("valid", "test")
    ]
    if count := sum(one.straddles for found in splits.values() for one in found):
        notes.append(
            f"In {count:,} rows a token holds the end of the prompt and the beginning "
            "of the answer, and counts. Does the prompt end in a space?"
        )
    tokens = sum(len(row.ids) for row in rows["train"])
    share = sum(row.num_trained for row in rows["train"]) / tokens
    kind = kinds["train"]
    digest = _digest(rows.values())
    return Dataset(*rows.values(), *examples, share, kind, tuple(notes), digest)


def _shortened(
    source: Source,
    found: list[_Encoded],
    max_length: int,
    too_long: str,
    notes: list[str],
) -> list[_Encoded]:
    long = [one for one in found if len(one.row.ids) > max_length]
    if not long:
        return found
    lines = [f"{one.row.place} ({len(one.row.ids):,} tokens)" for one in long]
    longest = max(len(one.row.ids) for one in long)
    if too_long == "refuse":
        raise ValueError(
            f"rows must have at most `max_length` = {max_length} tokens; the longest "
            f'has {longest:,}. Or set `too_long` to "drop" or "truncate".\n  '
            + listing(lines, len(lines))
        )
    kept = []
    for one in found:
        row = one.row
        if len(row.ids) > max_length:
            row = Row(row.ids[:max_length], row.labels[:max_length], row.place)
            if too_long == "drop" or not row.num_trained:
                continue
        kept.append(one._replace(row=row))
    dropped = len(found) - len(kept)
    counts = f"{dropped:,} dropped, {len(long) - dropped:,} truncated"
    notes.append(
        f"{source.name}: {len(long):,} rows have more than {max_length} tokens: "
        f"{counts}; the longest has {longest:,}."
    )
    if not kept:
        raise ValueError(f"{source.name} must have rows that are not dropped.")
    return kept


def _check_trained(source: Source, found: Sequence[_Encoded]) -> None:
    lines = [one.row.place for one in found if not one.row.num_trained]
    if lines:
        raise ValueError(
            f"rows of {source.name} must have a token that counts:\n  "
            + listing(lines, len(lines))
        )


def _digest(splits: Any) -> str:
    found = hashlib.sha256()
    for rows in splits:
        for row in rows:
            for x in (row.ids, row.labels):
                found.update(len(x).to_bytes(8, "little"))
                found.update(np.ascontiguousarray(x, "<i4").tobytes())
        found.update(b"split")
    return found.hexdigest()
