"""`qlora-jax train --preview`: shows rows with their target tokens."""

import itertools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.chat_tokenizer import Tokenizer
from ...data.encode import IGNORED
from ...printable import printable, printable_lines
from ...train.objectives import find_objective
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


def preview(run: Run) -> Preview:
    """Returns the first `run.config.preview` rows of the batches of a run."""
    config = run.config
    source = make_source(config.replace(epochs=1.0), run.data.train, run.data.mix)
    packs = (pack for index in range(len(source)) for pack in source.packs(index))
    is_labelled = find_objective(config.objective).rows == "labelled"
    good, bad = ("good answer", "bad answer") if is_labelled else ("chosen", "rejected")
    names = {None: "", True: f", {good}", False: f", {bad}"}
    rows = []
    for number, pack in enumerate(itertools.islice(packs, config.preview), 1):
        sequences = [x for i in pack for x in run.data.train[i].sequences]
        for position, sequence in enumerate(sequences, 1):
            is_target = sequence.labels != IGNORED
            # The first token is never predicted, nor is the prompt of a bad answer.
            is_target[: 1 if sequence.label is not False else sequence.start] = False
            place = f", sequence {position}" * config.packing
            row = {
                "name": f"row {number}{place}{names[sequence.label]}",
                "source": sequence.place,
                "tokens": len(sequence.ids),
                "targets": int(is_target.sum()),
                "pieces": _split_text(run.tokenizer, sequence.ids, is_target),
            }
            rows.append(row)
    return Preview(tuple(rows))


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
