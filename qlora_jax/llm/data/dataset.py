"""Reads data sets as rows of tokens, by split."""

import hashlib
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from .chat_tokenizer import Tokenizer
from .encode import Encoded, Encoder, Example, Row
from .kinds import TrainOn
from .readers import Source, convert_rows, listing, open_file
from .sources import find_sources, find_weights


class Dataset(NamedTuple):
    """Rows of a data set, by split.

    Attributes:
        train: The training set.
        valid: The validation set, which may be empty.
        test: The test set, which may be empty.
        valid_examples: The prompts and answers of `valid`, if its rows have any.
        test_examples: The prompts and answers of `test`, if its rows have any.
        trained_share: The share of the tokens in `train` that are targets.
        kind: The kind of the rows: "input_ids", "messages", "sharegpt",
            "prompt/completion", "alpaca", "text", "preference" or "labelled answer".
            If several data sets have different kinds, " and " joins them.
        notes: Notes for the user, one line each.
        mix: For several data sets: a pair for each, of its number of rows in `train`
            and its weight. Empty for a single data set.
        hash: A hash of the tokens and labels in `train` and `valid`.
        system: The system message of all rows, or None if they do not share one.

    Example:
        >>> Dataset([], [], [], [], [], 0.4, "messages", ()).kind
        'messages'
    """

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    valid_examples: list[Example]
    test_examples: list[Example]
    trained_share: float
    kind: str
    notes: tuple[str, ...]
    mix: tuple[tuple[int, float], ...] = ()
    hash: str = ""
    system: str | None = None


def read_dataset(
    path: str | pathlib.Path | Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    keys: Mapping[str, str] | None = None,
    train_on: TrainOn = "completions",
    too_long: Literal["error", "drop", "truncate", "split"] = "error",
    chat: bool = True,
    rows: Literal["texts", "pairs", "labelled"] = "texts",
    validation_split: float | None = None,
    seed: int = 0,
) -> Dataset:
    """Returns the rows of a data set as tokens, by split, with examples and notes.

    Args:
        path: A .jsonl, .json, .csv, .txt or .parquet file, a folder, or the id of a
            data set on the hub, "user/name" or "user/name:subset". A folder has such a
            file named train, and optionally files named valid (or validation, val, dev,
            eval) and test. A .txt file is one text, which is split into rows of
            `max_length` tokens. To mix several of these, pass their weights, as in
            "a.jsonl=0.7,b.jsonl=0.3" or `{"a.jsonl": 0.7, ...}`.
        tokenizer: The tokenizer of the model.
        vocab_size: All ids must be below this number.
        max_length: The largest number of tokens of a row.
        keys: Maps our keys to the keys of the rows, such as
            `{"prompt": "question", "completion": "answer"}`.
        train_on: The target tokens. "completions": all tokens of completions and of
            the assistant's messages. "last": the same, but of the assistant's messages
            only the last. "all": all tokens. Unused for rows of `input_ids`, which have
            `labels` instead.
        too_long: What to do with rows of more than `max_length` tokens. "split" is only
            for rows of `text`.
        chat: If the model has a chat template: whether to turn text prompts and
            completions, and rows of Alpaca, into messages of a user and an assistant.
        rows: The form of the rows. "texts": tokens, texts, messages, or prompts with
            completions. "pairs": chosen and rejected answers. "labelled": answers with
            a label, or pairs. Each pair becomes two labelled answers.
        validation_split: The share of the training rows to use for validation. One row
            is drawn at random from every `1 / validation_split` rows. Must be None for
            data that have validation rows.
        seed: The seed that selects the validation rows.

    Raises:
        ValueError: If rows are wrong, too long or without a target token. The message
            lists them.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [-100, 1]}')
        >>> data = read_dataset(path, Tokenizer("folder"), vocab_size=4, max_length=8)
        >>> data.kind, data.trained_share
        ('input_ids', 0.5)
    """
    if too_long not in ("error", "drop", "truncate", "split"):
        raise ValueError(
            f"`too_long` must be error, drop, truncate or split. Got {too_long!r}."
        )
    _check_max_length(max_length)
    if seed < 0:
        raise ValueError(f"`seed` must not be negative. Got {seed}.")
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
        rows=rows,
    )
    reader = _Reader(
        encoder,
        max_length,
        too_long,
        validation_split,
        draw_splits(validation_split, seed),
        separates_pairs=rows == "labelled",
    )
    weights = find_weights(path)
    counts = [reader.read(name) for name in weights]
    if validation_split is not None and not reader.rows["valid"]:
        raise ValueError(_NO_ROWS.format(validation_split, path, "validate on"))
    mix = tuple(zip(counts, weights.values(), strict=True))
    sequences = [x for row in reader.rows["train"] for x in row.sequences]
    system, *others = encoder.system_messages or {None}
    return Dataset(
        **reader.rows,
        valid_examples=reader.examples["valid"],
        test_examples=reader.examples["test"],
        trained_share=sum(x.num_trained for x in sequences)
        / sum(len(x.ids) for x in sequences),
        kind=" and ".join(reader.kinds),
        notes=reader.all_notes(),
        mix=mix if len(mix) > 1 else (),
        hash=reader.hasher.hexdigest()[:16],
        system=None if others else system,
    )


_NO_ROWS = (
    "`validation_split` must leave rows for training and for validation. Got {}, "
    "which leaves {} without rows to {}."
)


def _check_max_length(max_length: int) -> None:
    # The pieces of a long text overlap by one token.
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2. Got {max_length}.")


def draw_splits(share: float | None, seed: int) -> Iterator[str]:
    """Yields the split of each row. One of every `1 / share` rows is for validation."""
    # The rows are cut into groups (strata) of about `1 / share` rows. One row of each
    # group is for validation. So the share is exact to within one row, whatever the
    # number of rows.
    if share is None:
        yield from itertools.repeat("train")
        return
    generator, first = np.random.default_rng(seed), 0
    for stratum in itertools.count(1):
        # A stratum ends at a multiple of `1 / share`, rounded to an integer. So the
        # mean size of the strata is `1 / share`.
        size = round(stratum / share) - first
        chosen = generator.integers(size)
        yield from ("valid" if i == chosen else "train" for i in range(size))
        first += size


def _by_split() -> dict[str, Any]:
    return {"train": [], "valid": [], "test": []}


@dataclass(eq=False)
class _Reader:
    """Reads data sets one after the other, and collects their rows."""

    encoder: Encoder
    max_length: int
    too_long: str
    validation_share: float | None
    train_splits: Iterator[str]  # the split of each training row: "train" or "valid"
    separates_pairs: bool  # whether each completion of a pair is a row by itself
    rows: dict[str, Any] = field(default_factory=_by_split)
    examples: dict[str, list[Example]] = field(default_factory=_by_split)
    kinds: dict[str, None] = field(default_factory=dict)  # in order of appearance
    notes: list[str] = field(default_factory=list)
    hasher: Any = field(default_factory=hashlib.sha256)
    num_straddling: int = 0  # rows where one token covers text of prompt and answer

    def read(self, name: str) -> int:
        """Reads all splits of a data set, and returns its number of training rows."""
        sources, share = find_sources(name, self.notes), self.validation_share
        if share is not None and "valid" in sources:
            raise ValueError(
                "`validation_split` must be left out for data with validation rows. "
                f"Got {share}, and {sources['valid'].name}."
            )
        old_count = len(self.rows["train"])
        kinds = {}
        for split, source in sources.items():
            kinds[split] = self._read_split(split, source)  # also stores the rows
        if len({*kinds.values()}) > 1:
            raise ValueError(f"all splits must have rows of one kind. Got {kinds}.")
        self.kinds |= dict.fromkeys(kinds.values())
        count = len(self.rows["train"]) - old_count
        if not count:  # all rows were drawn for validation
            raise ValueError(_NO_ROWS.format(share, name, "train on"))
        return count

    def _read_split(self, split: str, source: Source) -> str:
        # Reads the rows of a split, and returns their kind.
        splits = self.train_splits if split == "train" else itertools.repeat(split)
        too_long = "split" if source.is_text else self.too_long
        cutter = _Cutter(source.name, self.max_length, too_long)

        def encode_row(number, raw):
            row_split = next(splits)
            # Only rows for validation or testing have examples.
            with_example = row_split != "train"
            encoded = self.encoder.encode(raw, source.name, number, with_example)
            return row_split, encoded

        for row_split, encoded in convert_rows(source, encode_row):
            # Each piece of a long text becomes a row. The first piece gets the split
            # that was drawn for the text, and each later piece takes the next one.
            for index, piece in enumerate(cutter.cut(encoded)):
                self._add(piece, next(splits) if index else row_split)
        self.notes += cutter.finish()
        return self.encoder.kind_of[source.name]

    def _add(self, piece: Encoded, split: str) -> None:
        row, example, straddles, *_ = piece
        self.num_straddling += straddles
        self.examples[split] += [example] if example else []
        if split != "test":
            for sequence in row.sequences:
                self._hash(sequence)
        if self.separates_pairs:
            self.rows[split] += [x._replace(rejected=None) for x in row.sequences]
        else:
            self.rows[split].append(row)

    def _hash(self, sequence: Row) -> None:
        # The length comes first, so that rows cannot run into each other.
        ids, labels, *_ = sequence.uncut or sequence
        self.hasher.update(np.int64(len(ids)).tobytes())
        for x in (ids, labels):
            self.hasher.update(np.asarray(x, np.int32).tobytes())
        if sequence.label is not None:
            start = np.int64(sequence.start).tobytes()
            self.hasher.update(bytes([sequence.label]) + start)

    def all_notes(self) -> tuple[str, ...]:
        """Returns the notes on data sets, unused keys and straddling tokens."""
        notes = [*self.notes]
        if unused := self.encoder.unused:
            notes.append(f"ignored keys of rows: {', '.join(unused)}")
        if self.num_straddling:
            notes.append(
                f"in {self.num_straddling:,} rows one token covers the end of the "
                "prompt and the beginning of the answer, and is a target. Does the "
                "prompt end with a space?"
            )
        return tuple(notes)


def read_rows(
    path: str | pathlib.Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int | None = None,
    keys: Mapping[str, str] | None = None,
    train_on: TrainOn = "completions",
    chat: bool = True,
) -> list[Row]:
    """Returns the rows of one file, with the settings of `read_dataset`.

    Rows may have any number of tokens, except that a .txt file is split into rows of
    `max_length` tokens. Rows of `text` get no end token.
    """
    if max_length is not None:
        _check_max_length(max_length)
    encoder = Encoder(
        tokenizer,
        vocab_size=vocab_size,
        train_on=train_on,
        keys=keys,
        chat=chat,
        ends_text=False,
    )
    source = open_file(path)

    def encode_row(number, raw):
        return encoder.encode(raw, source.name, number, False)

    encoded = [*convert_rows(source, encode_row)]
    if source.is_text and max_length is not None:
        encoded = [y for x in encoded for y in _split_row(x, max_length)]
    return [x.row for x in encoded]


def _split_row(encoded: Encoded, size: int) -> list[Encoded]:
    # Neighboring pieces overlap by one token: the last token of a piece is also the
    # first of the next. The first token of a piece is never a target, so each token of
    # the text, except the first, is a target in exactly one piece.
    ids, labels, place, *_ = encoded.row
    if len(ids) <= size:
        return [encoded]
    starts = range(0, len(ids) - 1, size - 1)
    spans = [slice(start, start + size) for start in starts]
    pieces = [Row(ids[span], labels[span], place) for span in spans]
    return [encoded._replace(row=piece, example=None) for piece in pieces]


@dataclass(eq=False)
class _Cutter:
    """Splits, truncates or drops the long rows of a split of a data set."""

    name: str  # of the split, for errors and notes
    max_length: int
    too_long: str  # as in `read_dataset`
    num_rows: int = 0
    num_pieces: int = 0
    num_long: int = 0
    longest: int = 0
    refused: list[str] = field(default_factory=list)  # rows that are too long
    untrained: list[str] = field(default_factory=list)  # rows without a target

    def cut(self, encoded: Encoded) -> list[Encoded]:
        """Returns a row in pieces of at most `max_length` tokens: none if dropped."""
        row, size, pieces = encoded.row, encoded.row.longest, [encoded]
        if size > self.max_length:
            self.num_long, pieces = self.num_long + 1, []
            if self.too_long == "split" and encoded.kind == "text":
                pieces = _split_row(encoded, self.max_length)
            elif self.too_long in ("error", "split"):
                self.refused.append(f"{row.place} ({size:,} tokens)")
            elif self.too_long == "truncate":
                # A truncated row has no example, since its answer may be cut.
                row = row.truncated(self.max_length)
                pieces = [encoded._replace(row=row, example=None)]
                pieces = pieces if row.is_trained else []
        self.longest = max(self.longest, size)
        self.num_rows, self.num_pieces = (
            self.num_rows + 1,
            self.num_pieces + len(pieces),
        )
        self.untrained += [row.place for x in pieces if not x.row.is_trained]
        return pieces

    def finish(self) -> list[str]:
        """Rejects rows that are too long or have no target. Returns notes on others."""
        name, limit = self.name, self.max_length
        longest = f"{self.longest:,}"
        if self.refused:
            raise ValueError(
                f"rows must have at most `max_length` = {limit} tokens; the longest "
                f"has {longest}. Raise it, or set `too_long` to drop or truncate, or "
                f"to split, which is for rows of `text`.\n  {listing(self.refused)}"
            )
        if not self.num_pieces:
            is_cut = self.too_long == "truncate"
            need = "a target among their first" if is_cut else "at most"
            raise ValueError(
                f"{name} must have rows with {need} `max_length` = {limit} tokens. "
                f"None of the {self.num_rows:,} rows has; the longest has {longest}."
            )
        if self.untrained:
            raise ValueError(
                f"rows of {name} must have a token to train on. These have none:\n  "
                + listing(self.untrained)
            )
        if not self.num_long:
            return []
        if self.too_long == "split":
            return [
                f"{name}: texts of more than {limit} tokens continue in the next row: "
                f"{self.num_pieces:,} rows of {self.num_rows:,} texts."
            ]
        num_dropped = self.num_rows - self.num_pieces
        return [
            f"{name}: of {self.num_long:,} rows with more than {limit} tokens, "
            f"{num_dropped:,} are dropped and {self.num_long - num_dropped:,} "
            f"truncated; the longest has {longest}."
        ]
