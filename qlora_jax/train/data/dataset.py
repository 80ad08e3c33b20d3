"""Reads data sets as rows of tokens, by split."""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .chat_tokenizer import Tokenizer
from .cutting import Cuts, cut_row
from .encode import Encoded, Encoder, Example, Row
from .lines import Lines, Streamed
from .rows import Source, converted, find_sources, find_weights, open_file

_SPLITS = ("train", "valid", "test")


class Dataset(NamedTuple):
    """Rows of a data set, by split.

    Attributes:
        train: Rows to train on.
        valid: Rows to validate on; may be empty.
        test: Rows to test on; may be empty.
        valid_examples: Prompts and answers of `valid`, where its rows have some.
        test_examples: Those of `test`.
        trained_share: The share of the tokens in `train` that are trained.
        kind: The kind of the rows: "input_ids", "messages", "sharegpt",
            "prompt/completion", "alpaca", "text", "preference" or "labelled answer".
        notes: Notes for the user, a line each.
        mix: Of several data sets: how many rows each has in `train`, and its weight.
        hash: Of the tokens and labels in `train` and `valid`.

    Example:
        >>> Dataset([], [], [], [], [], 0.4, "messages", ()).kind
        'messages'
    """

    train: Sequence[Row]
    valid: list[Row]
    test: list[Row]
    valid_examples: list[Example]
    test_examples: list[Example]
    trained_share: float
    kind: str
    notes: tuple[str, ...]
    mix: tuple[tuple[int, float], ...] = ()
    hash: str = ""


def read_dataset(
    path: str | pathlib.Path | Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    keys: Mapping[str, str] | None = None,
    train_on: Literal["completions", "last", "all"] = "completions",
    too_long: Literal["refuse", "drop", "truncate", "split"] = "refuse",
    chat: bool = True,
    objective: str = "sft",
    stream: bool = False,
    validation_split: float | None = None,
    seed: int = 0,
) -> Dataset:
    """Returns the rows of a data set as tokens, by split, with examples and notes.

    Args:
        path: A .jsonl, .json, .csv or .txt file (or any of them with .gz), or .parquet;
            a folder with such a file called train, and perhaps one called valid (or
            validation, val, dev or eval) and one called test; or the id of a data set
            on the hub, such as "user/name" or "user/name:subset". A .txt file is one
            text, cut into rows of `max_length` tokens. Or several of them with their
            weights, such as "a.jsonl=0.7,b.jsonl=0.3" or `{"a.jsonl": 0.7, ...}`.
        tokenizer: The model's.
        vocab_size: Ids must be below.
        max_length: The most tokens of a row.
        keys: The names in the rows of our keys, such as
            `{"prompt": "question", "completion": "answer"}`.
        train_on: The tokens to train on: those of completions and of the assistant's
            messages; of these the last one's; or all. Rows of `input_ids` have
            `labels`.
        too_long: For rows of more than `max_length` tokens; only `text` can be split.
        chat: Whether prompts and completions that are texts, and Alpaca's rows, become
            messages of a user and an assistant if the model has a chat template.
        objective: What the rows are for: sft (supervised fine-tuning), or a loss of
            preferences, dpo, ipo, orpo, simpo or kto.
        stream: Whether rows to train on stay in their files, which are .jsonl: they are
            read once, for what is wrong and for their lengths, and again, one by one,
            when they are asked for.
        validation_split: The share of the training rows to validate on instead, for
            data without validation rows: of every `1 / validation_split` rows one.
        seed: Chooses which one.

    Raises:
        ValueError: If a file cannot be read, or rows are wrong, too long or without a
            trained token. The message lists them.
        ImportError: If a library is missing that the data needs.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [-100, 1]}')
        >>> data = read_dataset(path, Tokenizer("folder"), vocab_size=4, max_length=8)
        >>> data.kind, data.trained_share
        ('input_ids', 0.5)
    """
    if too_long not in ("refuse", "drop", "truncate", "split"):
        raise ValueError(
            '`too_long` must be "refuse", "drop", "truncate" or "split". Got '
            f"{too_long!r}."
        )
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2. Got {max_length}.")
    if validation_split is not None and not 0 < validation_split < 1:
        raise ValueError(
            f"`validation_split` must be between 0 and 1. Got {validation_split}."
        )
    encoder = Encoder(
        tokenizer,
        vocab_size=vocab_size,
        train_on=train_on,
        keys=keys,
        chat=chat,
        objective=objective,
    )
    if stream and objective != "sft":
        raise ValueError(f"`stream` must be false for {objective}. Got true.")
    read, kinds, notes = _Read(stream, objective == "kto"), {}, []
    counts, weights = [0], find_weights(path)
    splits_of_rows = draw_splits(validation_split, seed)
    encode = lambda raw, place: encoder.encode(raw, None, place, False)
    pieces = lambda raw, place: cut_row(*encode(raw, place), max_length, too_long)
    for name in weights:
        kinds_here: dict[str, str] = {}
        sources = find_sources(name, notes)
        if validation_split is not None and "valid" in sources:
            raise ValueError(
                "`validation_split` must be left out for data with validation rows. "
                f"Got {validation_split}, and {sources['valid'].name}."
            )
        for split, source in sources.items():
            lines = Lines(source.name, pieces) if stream and split == "train" else None
            source = source if lines is None else lines.source
            how = "split" if source.is_text else too_long
            cuts = Cuts(source, max_length, how)
            splits = splits_of_rows if split == "train" else itertools.repeat(split)
            for row_split, kind, one in _encode(source, encoder, splits):
                kinds_here[split] = kind
                # The pieces of a long text are rows of their own.
                splits_of_pieces = itertools.chain([row_split], splits)
                read.add(splits_of_pieces, cuts.cut(kind, one), lines)
            cuts.end(notes)
        if len({*kinds_here.values()}) > 1:
            raise ValueError(
                f"all splits must have rows of one kind. Got {kinds_here}."
            )
        kinds |= dict.fromkeys(kinds_here.values())
        counts.append(len(read.rows["train"]))
        if counts[-1] == counts[-2]:
            raise ValueError(_NO_ROWS.format(validation_split, name, "train on"))
    if validation_split is not None and not read.rows["valid"]:
        raise ValueError(_NO_ROWS.format(validation_split, path, "validate on"))
    if encoder.unused:
        notes.append(f"keys of rows that are not used: {', '.join(encoder.unused)}")
    if read.straddling:
        notes.append(
            f"in {read.straddling:,} rows one token holds the end of the prompt and "
            "the beginning of the answer, and is trained: does the prompt end with a "
            "space?"
        )
    mix = tuple(zip(np.diff(counts).tolist(), weights.values(), strict=True))
    return Dataset(
        **read.rows,
        valid_examples=read.examples["valid"],
        test_examples=read.examples["test"],
        trained_share=read.trained / read.tokens,
        kind=" and ".join(kinds),
        notes=tuple(notes),
        mix=mix if len(mix) > 1 else (),
        hash=read.hash.hexdigest()[:16],
    )


_NO_ROWS = (
    "`validation_split` must leave rows on both sides. Got {}, with which {} has none "
    "to {}."
)


def draw_splits(share: float | None, seed: int) -> Iterator[str]:
    """Yields the split of each row: of every `1 / share` rows one is for validation.

    So a share is right within a row, however many rows there are.
    """
    if share is None:
        yield from itertools.repeat("train")
        return
    generator, first = np.random.default_rng(seed), 0
    for stratum in itertools.count(1):
        size = round(stratum / share) - first
        chosen = generator.integers(size)
        yield from ("valid" if i == chosen else "train" for i in range(size))
        first += size


class _Read:
    """The rows that are read."""

    def __init__(self, stream: bool, alone: bool):
        """With `alone`, each answer of a pair is a row."""
        self.rows: dict[str, Any] = {split: [] for split in _SPLITS}
        self.examples: dict[str, list[Example]] = {split: [] for split in _SPLITS}
        if stream:
            self.rows["train"] = Streamed()
        self.straddling = self.trained = self.tokens = 0
        self.hash, self._alone = hashlib.sha256(), alone

    def add(
        self, splits: Iterator[str], pieces: list[Encoded], lines: Lines | None
    ) -> None:
        """Adds the pieces of a row; those to train on of `lines` stay there."""
        pairs = zip(pieces, splits, strict=False)
        for index, ((row, example, straddles), split) in enumerate(pairs):
            self.straddling += straddles
            self.examples[split] += [example] if example else []
            if split != "test":
                self._hash(row)
            if split == "train":
                self.trained += sum(one.num_trained for one in row.sequences)
                self.tokens += sum(len(one.ids) for one in row.sequences)
            if lines is not None and split == "train":
                self.rows[split].add(lines, index, row)
            elif self._alone:
                self.rows[split] += [x._replace(rejected=None) for x in row.sequences]
            else:
                self.rows[split].append(row)

    def _hash(self, row: Row) -> None:
        for one in row.sequences:
            self.hash.update(np.int64(len(one.ids)).tobytes())
            for x in (one.ids, one.labels):
                self.hash.update(np.asarray(x, np.int32).tobytes())
            if one.label is not None:
                self.hash.update(bytes([one.label]) + np.int64(one.start).tobytes())


def read_rows(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int | None = None,
) -> list[Row]:
    """Returns the rows of one file, of any length; a `text` gets no token for its end.

    Args:
        path: The file, as `read_dataset` takes it.
        tokenizer: Turns text into tokens; not used for rows with `input_ids`.
        vocab_size: Ids must be below.
        max_length: The most tokens of a row of a .txt file, which is cut; None: any.

    Raises:
        ValueError: If lines are wrong. The message lists them.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [3, -100]}')
        >>> [row] = read_rows(path, Tokenizer("folder"), vocab_size=4)
        >>> row.ids.tolist(), row.labels.tolist()
        ([3, 1], [3, -100])
    """
    encoder = Encoder(tokenizer, vocab_size=vocab_size, ends_text=False)
    source = open_file(path)
    splits = itertools.repeat("train")
    found = [one for *_, one in _encode(source, encoder, splits)]
    if source.is_text and max_length is not None:
        found = [x for one in found for x in cut_row("text", one, max_length, "split")]
    return [one.row for one in found]


def _encode(
    source: Source, encoder: Encoder, splits: Iterator[str]
) -> Iterator[tuple[str, str, Encoded]]:
    """Yields the rows of a source with their splits and kind.

    Rows of other splits than "train" have examples. At the end refuses wrong rows.
    """
    kind = None

    def encode(number: int, raw: Any) -> tuple[str, str, Encoded]:
        split, place = next(splits), f"{source.name}:{number}"
        return split, *encoder.encode(raw, kind, place, split != "train")

    for split, kind, one in converted(source, encode):
        yield split, kind, one
    if kind is None:
        raise ValueError(f"{source.name} must have rows. Got none.")
