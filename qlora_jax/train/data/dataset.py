"""Reads data sets as rows of tokens, by split."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from ..._jax.progress import progress_bar
from .chat_tokenizer import Tokenizer
from .encode import Encoded, Encoder, Example, Row
from .model_files import ModelError
from .rows import Problems, Source, find_sources, find_weights, listing, open_file

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


def read_dataset(
    path: str | pathlib.Path | Mapping[str, float],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_length: int,
    keys: Mapping[str, str] | None = None,
    train_on: Literal["completions", "all"] = "completions",
    too_long: Literal["refuse", "drop", "truncate", "split"] = "refuse",
    chat: bool = True,
    objective: str = "sft",
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
            messages, or all. Rows of `input_ids` have `labels`.
        too_long: For rows of more than `max_length` tokens; only `text` can be split.
        chat: Whether prompts and completions that are texts, and Alpaca's rows, become
            messages of a user and an assistant if the model has a chat template.
        objective: What the rows are for: sft (supervised fine-tuning), or a loss of
            preferences, dpo, ipo, orpo, simpo or kto.

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
    encoder = Encoder(
        tokenizer,
        vocab_size=vocab_size,
        train_on=train_on,
        keys=keys,
        chat=chat,
        objective=objective,
    )
    every_kind: dict[str, None] = {}
    splits: dict[str, list[Encoded]] = {split: [] for split in _SPLITS}
    notes: list[str] = []
    counts, weights = [0], find_weights(path)
    for name in weights:
        kinds: dict[str, str] = {}
        for split, source in find_sources(name, notes).items():
            found, kinds[split] = _encode(source, encoder, examples=split != "train")
            how = "split" if source.is_text else too_long
            if how == "split" and kinds[split] == "text":
                found = _split(source, found, max_length, notes)
            else:
                found = _shortened(source, found, max_length, how, notes)
            _check_trained(source, found)
            splits[split] += found
        if len({*kinds.values()}) > 1:
            raise ValueError(f"all splits must have rows of one kind. Got {kinds}.")
        every_kind |= dict.fromkeys(kinds.values())
        alone = objective == "kto"
        sizes = [len(one.row.sequences) if alone else 1 for one in splits["train"]]
        counts.append(sum(sizes))
    rows = {split: [one.row for one in found] for split, found in splits.items()}
    if objective == "kto":  # it takes each answer by itself
        for split, found in rows.items():
            rows[split] = [
                one._replace(rejected=None) for row in found for one in row.sequences
            ]
    examples = {
        split: [one.example for one in found if one.example]
        for split, found in splits.items()
    }
    if encoder.unused:
        notes.append(f"keys of rows that are not used: {', '.join(encoder.unused)}")
    if count := sum(one.straddles for found in splits.values() for one in found):
        notes.append(
            f"in {count:,} rows one token holds the end of the prompt and the "
            "beginning of the answer, and is trained: does the prompt end with a space?"
        )
    sequences = [one for row in rows["train"] for one in row.sequences]
    trained = sum(row.num_trained for row in sequences)
    share = trained / sum(len(row.ids) for row in sequences)
    mix = tuple(zip(np.diff(counts).tolist(), weights.values(), strict=True))
    return Dataset(
        **rows,
        valid_examples=examples["valid"],
        test_examples=examples["test"],
        trained_share=share,
        kind=" and ".join(every_kind),
        notes=tuple(notes),
        mix=mix if len(mix) > 1 else (),
    )


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
    found, _ = _encode(source, encoder, examples=False)
    if source.is_text and max_length is not None:
        found = _split(source, found, max_length, [])
    return [one.row for one in found]


def _encode(
    source: Source, encoder: Encoder, *, examples: bool
) -> tuple[list[Encoded], str]:
    """Returns the rows of a source, and their kind."""
    problems, found, kind = Problems(source), [], None
    title, rows = f"reading {source.name}", source.rows
    bar = progress_bar(title, " rows", iterable=rows, delay=2, leave=False)
    for number, raw in bar:
        try:
            if isinstance(raw, Exception):
                raise raw
            place = f"{source.name}:{number}"
            kind, one = encoder.encode(raw, kind, place, examples)
            found.append(one)
        except ModelError:
            raise
        except (ValueError, RecursionError) as error:
            problems.add(number, error)
    problems.refuse()
    if not found:
        raise ValueError(f"{source.name} must have rows. Got none.")
    return found, kind or ""


def _split(
    source: Source, found: list[Encoded], max_length: int, notes: list[str]
) -> list[Encoded]:
    """Cuts texts into rows of at most `max_length` tokens."""
    # A row begins with the last token of the row before, which is predicted there: each
    # token but the first of a text is predicted once.
    step = max(max_length - 1, 1)
    pieces = [
        Encoded(Row(ids[at : at + step + 1], labels[at : at + step + 1], place))
        for ids, labels, place, *_ in (one.row for one in found)
        for at in range(0, max(len(ids) - 1, 1), step)
    ]
    if len(pieces) > len(found):
        notes.append(
            f"{source.name}: texts of more than {max_length} tokens go on in the next "
            f"row: {len(pieces):,} rows of {len(found):,} texts."
        )
    return pieces


def _shortened(
    source: Source,
    found: list[Encoded],
    max_length: int,
    too_long: str,
    notes: list[str],
) -> list[Encoded]:
    """Refuses, drops or truncates rows that are too long."""
    long = [one.row for one in found if one.row.longest > max_length]
    if not long:
        return found
    longest = max(row.longest for row in long)
    lines = [f"{row.place} ({row.longest:,} tokens)" for row in long]
    if too_long in ("refuse", "split"):
        raise ValueError(
            f"rows must have at most `max_length` = {max_length} tokens; the longest "
            f"has {longest:,}. Raise it, or set `too_long` to drop or truncate, or to "
            "split, which is for rows of `text`.\n  " + listing(lines)
        )
    kept = []
    for one in found:
        if one.row.longest > max_length:
            row = one.row.truncated(max_length)
            if too_long == "drop" or not row.is_trained:
                continue
            one = Encoded(row, None, one.straddles)  # its answer may be cut
        kept.append(one)
    if not kept:
        raise ValueError(
            f"{source.name} must have rows of at most {max_length} tokens. Got none."
        )
    dropped = len(found) - len(kept)
    notes.append(
        f"{source.name}: of {len(long):,} rows with more than {max_length} tokens, "
        f"{dropped:,} are dropped and {len(long) - dropped:,} truncated; the longest "
        f"has {longest:,}."
    )
    return kept


def _check_trained(source: Source, found: Sequence[Encoded]) -> None:
    if lines := [one.row.place for one in found if not one.row.is_trained]:
        raise ValueError(
            f"rows of {source.name} must have a token to train on. None in:\n  "
            + listing(lines)
        )
