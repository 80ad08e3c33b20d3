"""`qlora-jax train --preview`: shows rows as they are trained."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

import qlora_jax as ql

from .run import Run, make_batches

_COLOURED, _MARKED = ("\033[4;32m", "\033[0m"), ("⟦", "⟧")  # around targets


@dataclass(frozen=True)
class PreviewedRow:
    """A sequence of a `Preview`.

    Attributes:
        name: Its place in the batches, and for preferences which answer it has.
        source: Its source, such as "train.jsonl:17"; "" if it is not known.
        tokens: Number of tokens.
        targets: Number of tokens that the model is trained to predict.
        pieces: Its text in pieces, each with whether its tokens are targets.

    Example:
        >>> from qlora_jax import cli
        >>> pieces = ("2 + 2 = ", False), ("4", True)
        >>> print(cli.PreviewedRow("row 1", "train.jsonl:17", 8, 1, pieces))
        row 1, train.jsonl:17: 8 tokens, 1 target
        2 + 2 = ⟦4⟧
    """

    name: str
    source: str
    tokens: int
    targets: int
    pieces: tuple[tuple[str, bool], ...]

    def __str__(self):
        is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        begin, end = _COLOURED if is_coloured else _MARKED
        source, s = f", {self.source}" * bool(self.source), "s" * (self.targets != 1)
        counts = f"{self.tokens:,} tokens, {self.targets:,} target{s}"
        pieces = (f"{begin}{text}{end}" if y else text for text, y in self.pieces)
        return f"{self.name}{source}: {counts}\n{''.join(pieces)}"


@dataclass(frozen=True)
class Preview:
    """Rows as they are trained, from `train` with `preview`.

    As text, targets are green and underlined on a terminal, and in brackets elsewhere.

    Attributes:
        rows: The sequences of the first rows of batches.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Preview((cli.PreviewedRow("row 1", "", 3, 3, (("all", True),)),)))
        row 1: 3 tokens, 3 targets
        ⟦all⟧
    """

    rows: tuple[PreviewedRow, ...]

    def __str__(self):
        return "\n".join(str(row).removesuffix("\n") for row in self.rows)


def preview(run: Run) -> Preview:
    """Returns the first `run.config.preview` rows of the batches of a run."""
    shown, last = [], run.config.preview or 0
    batches = make_batches(run.config, run.data, num_epochs=1)
    sequences = (sequence for batch in batches for sequence in _sequences(run, batch))
    row = 0
    for is_new, name, ids, is_target in sequences:
        row += is_new
        if row > last:
            break
        # A stream is not searched: each of its rows would be read again.
        rows = () if run.config.stream else run.data.train
        same = (x for y in rows for x in y.sequences if np.array_equal(x.ids, ids))
        source = next((x.place for x in same), "")
        counts = len(ids), int(is_target.sum())
        pieces = _pieces(run.tokenizer, ids, is_target)
        shown.append(PreviewedRow(f"row {row}{name}", source, *counts, pieces))
    return Preview(tuple(shown))


def _sequences(
    run: Run, batch: "ql.train.Batch"
) -> Iterator[tuple[bool, str, np.ndarray, np.ndarray]]:
    """Yields the sequences of a batch.

    Each with whether a row begins, what it is, its tokens, and which are targets.
    """
    is_packed, answers = run.config.packing, batch.answers
    for index, segments in enumerate(batch.segment_ids):
        is_counted = batch.weights[index] != 0
        if answers is not None:
            is_counted |= answers[index].any(axis=0)
        is_target = np.zeros(len(segments), bool)
        is_target[batch.select[index, is_counted] + 1] = True
        for segment in range(1, segments.max() + 1):
            name = f", sequence {segment}" * is_packed
            is_new, here = segment == 1, segments == segment
            if answers is not None:
                # Answers come in twos, which share a row if packed.
                is_second = bool((segment - 1 if is_packed else index) % 2)
                is_new &= not is_second
                is_good = answers[index, segment - 1].max() > 0
                name += f", {_name(run.config.objective, is_second, is_good)}"
            yield is_new, name, batch.ids[index, here], is_target[here]


def _name(objective: str, is_second: bool, is_good: bool) -> str:
    """Returns which answer a sequence has."""
    if objective != "kto":
        return "rejected" if is_second else "chosen"
    if is_second:  # which estimates the distance from the reference
        return "with the answer of another row"
    return "good answer" if is_good else "bad answer"


def _pieces(
    tokenizer: "ql.train.Tokenizer", ids: np.ndarray, is_target: np.ndarray
) -> tuple[tuple[str, bool], ...]:
    """Cuts the text of tokens where targets begin and end."""
    tokens = ids.tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    pieces, start = [], 0
    for cut in [*np.flatnonzero(np.diff(is_target)) + 1, len(ids)]:
        # Decoded alone, tokens may lack a space before them or part of a character.
        part = tokenizer.decode(tokens[:cut], skip_special_tokens=False)
        stop = max(start, len(os.path.commonprefix([text, part])))
        pieces.append((text[start:stop], bool(is_target[cut - 1])))
        start = stop
    return tuple(pieces)
