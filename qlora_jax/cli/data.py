"""Rows of tokens to score, from a JSONL file."""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

IGNORED = -100  # the label of a token that does not count, as in PyTorch
_LISTED = 10


class Row(NamedTuple):
    """One sequence.

    Attributes:
        ids: Its tokens.
        labels: For each token, the id that the model should have predicted there, or
            `IGNORED`; the first is predicted by none and never counts.
    """

    ids: np.ndarray
    labels: np.ndarray


def read_rows(
    path: str | pathlib.Path,
    encode: Callable[[str], Sequence[int]],
    vocab_size: int,
) -> list[Row]:
    """Reads a JSONL file.

    Each line is an object with `input_ids` and perhaps `labels`, or with `text`. Where
    there are no labels they are the ids, so that every token but the first counts.
    Other keys are ignored.

    Args:
        path: The file.
        encode: Turns text into tokens; called only for rows without `input_ids`.
        vocab_size: Ids must be below.

    Raises:
        ValueError: If lines are not of that kind; they are listed.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"input_ids": [3, 1], "labels": [3, -100]}')
        >>> [row] = read_rows(path, list, vocab_size=4)
        >>> row.ids.tolist(), row.labels.tolist()
        ([3, 1], [3, -100])
    """
    rows, problems = [], []
    try:
        lines = pathlib.Path(path).read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8. {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, encode, vocab_size))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems:
        listing = "\n  ".join(problems[:_LISTED])
        more = len(problems) - _LISTED
        rest = f"\n  and {more} more" if more > 0 else ""
        raise ValueError(f"lines of {path} are wrong:\n  {listing}{rest}")
    if not rows:
        raise ValueError(f"{path} must have rows. Got none.")
    return rows


def _row(line: str, encode: Callable[[str], Sequence[int]], vocab_size: int) -> Row:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object.")
    if "input_ids" in found:
        ids = _ids("input_ids", found["input_ids"], vocab_size)
    elif isinstance(found.get("text"), str):
        if "labels" in found:
            raise ValueError("`labels` need `input_ids`. Got `text`.")
        ids = _ids("the ids of `text`", list(encode(found["text"])), vocab_size)
    else:
        raise ValueError("it must have `input_ids`, or `text`.")
    if not len(ids):
        raise ValueError("it must have at least one token. Got none.")
    labels = ids
    if found.get("labels") is not None:
        labels = _ids("labels", found["labels"], vocab_size, ignored=True)
    if len(labels) != len(ids):
        raise ValueError(f"it must have {len(ids)} labels. Got {len(labels)}.")
    return Row(ids, labels)


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


class Batch(NamedTuple):
    """Rows padded on the right, `[B, T]`.

    Attributes:
        ids: Their tokens.
        labels: Their labels.
        is_token: False for padding.
    """

    ids: np.ndarray
    labels: np.ndarray
    is_token: np.ndarray


def batches(rows: Sequence[Row], max_tokens: int) -> Iterator[Batch]:
    """Yields the rows in batches of few different shapes, the longest last.

    Lengths are rounded up, to powers of two and three quarters of such, and batches are
    filled up with rows that do not count, so that few programs are compiled.

    Args:
        rows: The rows.
        max_tokens: The most tokens of a batch, with padding; a longer row is alone.

    Example:
        >>> ids = np.arange(5, dtype=np.int32)
        >>> [batch] = batches([Row(ids, ids)] * 3, max_tokens=64)
        >>> batch.ids.shape, (batch.labels != IGNORED).sum()
        ((4, 16), np.int64(15))
    """
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(_rounded(len(row.ids)), []).append(row)
    for length, group in sorted(by_length.items()):
        size = min(max(max_tokens // length, 1), _power_of_two(len(group)))
        for start in range(0, len(group), size):
            ids = np.zeros((size, length), np.int32)
            labels = np.full((size, length), IGNORED, np.int32)
            is_token = np.zeros((size, length), bool)
            for place, row in enumerate(group[start : start + size]):
                ids[place, : len(row.ids)] = row.ids
                labels[place, : len(row.ids)] = row.labels
                is_token[place, : len(row.ids)] = True
            yield Batch(ids, labels, is_token)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _rounded(length: int) -> int:
    size = max(_power_of_two(length), 16)
    return size * 3 // 4 if length <= size * 3 // 4 and size > 16 else size
