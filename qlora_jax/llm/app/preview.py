"""`qlora-jax train --preview`: shows rows with their target tokens."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.batching import Batch
from ..data.chat_tokenizer import Tokenizer
from ..printable import printable, printable_lines
from ..train.objectives import find_objective
from .run import Run, make_source

# Strings before and after targets: green underlined text on terminals, or brackets.
_COLORED, _BRACKETED = ("\033[4;32m", "\033[0m"), ("⟦", "⟧")


@dataclass(frozen=True)
class Preview:
    """The result of `train` with `preview`: rows as they would be trained.

    As text, targets are green and underlined on a terminal, and in brackets elsewhere.

    Attributes:
        rows: For each sequence of the first rows of the batches: its `name`, its
            `source`, the numbers of its `tokens` and `targets`, and
            `pieces`: pairs of a text and whether its tokens are targets.

    Example:
        >>> from qlora_jax.llm import app
        >>> row = dict(name="row 1", source="train.jsonl:17", tokens=8, targets=1)
        >>> print(app.Preview((row | {"pieces": (("2 + 2 = ", False), ("4", True))},)))
        row 1, train.jsonl:17: 8 tokens, 1 target
        2 + 2 = ⟦4⟧
    """

    rows: tuple[Mapping[str, Any], ...]

    def __str__(self):
        # https://no-color.org
        has_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        start, end = _COLORED if has_colors else _BRACKETED
        lines = []
        for row in self.rows:
            title = printable(", ".join(filter(None, (row["name"], row["source"]))))
            s = "s" * (row["targets"] != 1)
            lines.append(f"{title}: {row['tokens']} tokens, {row['targets']} target{s}")
            pieces = (
                (printable_lines(text), is_target) for text, is_target in row["pieces"]
            )
            texts = (f"{start}{x}{end}" if is_target else x for x, is_target in pieces)
            lines.append("".join(texts).removesuffix("\n"))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Sequence:
    starts_row: bool  # whether it is the first sequence of a row
    suffix: str  # added to the row's name, such as ", chosen"
    place: str  # as in `Row`
    ids: np.ndarray
    is_target: np.ndarray


def preview(run: Run) -> Preview:
    """Returns the first `run.config.preview` rows of the batches of a run."""
    rows, num_rows = [], 0
    config = run.config.replace(epochs=1.0)
    source = make_source(config, run.data.train, run.data.mix)
    for index in range(len(source)):
        places = [row.place for group in source.groups(index) for row in group]
        for sequence in _split_batch(run, source[index], places):
            num_rows += sequence.starts_row
            if num_rows > (run.config.preview or 0):
                return Preview(tuple(rows))
            row = {
                "name": f"row {num_rows}{sequence.suffix}",
                "source": sequence.place,
                "tokens": len(sequence.ids),
                "targets": int(sequence.is_target.sum()),
                "pieces": _split_text(run.tokenizer, sequence.ids, sequence.is_target),
            }
            rows.append(row)
    return Preview(tuple(rows))


def _split_batch(run: Run, batch: Batch, places: list[str]) -> Iterator[_Sequence]:
    # `places` are those of the rows. Each row has two sequences if it has answers.
    is_packed, answers = run.config.packing, batch.answers
    per_row = 1 if answers is None else 2
    sequence_places = (place for place in places for _ in range(per_row))
    is_labelled = find_objective(run.config.objective).rows == "labelled"
    for index, segments in enumerate(batch.segment_ids):
        has_target = batch.weights[index] != 0
        # Targets of bad answers have weight 0. In `answers` [rows, sequences, targets],
        # they are -1, and those of good answers are 1.
        if answers is not None:
            has_target |= answers[index].any(axis=0)
        # `select` has the positions whose next token is a target.
        is_target = np.zeros(len(segments), bool)
        is_target[batch.select[index, has_target] + 1] = True
        for segment in range(1, segments.max() + 1):  # 0 is padding
            suffix = f", sequence {segment}" * is_packed
            starts_row = segment == 1
            is_in_segment = segments == segment
            if answers is not None:
                # The two answers of a pair follow each other: in two rows of the batch
                # or, if packed, in one.
                is_second = bool((segment - 1 if is_packed else index) % 2)
                starts_row &= not is_second
                if is_labelled and is_second:
                    suffix += ", with the answer of another row"
                elif is_labelled:
                    is_good = answers[index, segment - 1].max() > 0
                    suffix += ", good answer" if is_good else ", bad answer"
                else:
                    suffix += ", rejected" if is_second else ", chosen"
            ids, place = batch.ids[index, is_in_segment], next(sequence_places)
            yield _Sequence(starts_row, suffix, place, ids, is_target[is_in_segment])


def _split_text(
    tokenizer: Tokenizer, ids: np.ndarray, is_target: np.ndarray
) -> tuple[tuple[str, bool], ...]:
    """Returns the pieces of a text, and whether the tokens of each are targets."""
    tokens = ids.tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    pieces, start = [], 0
    for cut in [*np.flatnonzero(np.diff(is_target)) + 1, len(ids)]:
        # All tokens up to the cut are decoded together, because tokens may lose a space
        # or a part of a character without those before them.
        decoded = tokenizer.decode(tokens[:cut], skip_special_tokens=False)
        end = max(start, len(os.path.commonprefix([text, decoded])))
        pieces.append((text[start:end], bool(is_target[cut - 1])))
        start = end
    return tuple(pieces)
