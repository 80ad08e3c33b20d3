"""`qlora-jax train --preview`: shows rows as they would be trained."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import qlora_jax as ql

from .run import Run, make_batches

_COLOURED, _MARKED = ("\033[4;32m", "\033[0m"), ("⟦", "⟧")  # around targets


@dataclass(frozen=True)
class Preview:
    """Rows as they would be trained, from `train` with `preview`.

    As text, targets are green and underlined on a terminal, and in brackets elsewhere.

    Attributes:
        rows: For each sequence of the first rows of the batches: its `name`, its
            `source` ("" if it is not known), the numbers of its `tokens` and `targets`,
            and its text in `pieces`, each with whether its tokens are targets.

    Example:
        >>> from qlora_jax import cli
        >>> row = dict(name="row 1", source="train.jsonl:17", tokens=8, targets=1)
        >>> print(cli.Preview((row | {"pieces": (("2 + 2 = ", False), ("4", True))},)))
        row 1, train.jsonl:17: 8 tokens, 1 target
        2 + 2 = ⟦4⟧
    """

    rows: tuple[Mapping[str, Any], ...]

    def __str__(self):
        is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        begin, end = _COLOURED if is_coloured else _MARKED
        lines = []
        for row in self.rows:
            title = ", ".join(filter(None, (row["name"], row["source"])))
            s = "s" * (row["targets"] != 1)
            lines.append(f"{title}: {row['tokens']} tokens, {row['targets']} target{s}")
            texts = (f"{begin}{text}{end}" if y else text for text, y in row["pieces"])
            lines.append("".join(texts).removesuffix("\n"))
        return "\n".join(lines)


def preview(run: Run) -> Preview:
    """Returns the first `run.config.preview` rows of the batches of a run."""
    rows, number = [], 0
    batches = make_batches(run.config, run.data, num_epochs=1)
    sequences = (sequence for batch in batches for sequence in _sequences(run, batch))
    for is_new, name, ids, is_target in sequences:
        number += is_new
        if number > (run.config.preview or 0):
            break
        # Rows of a stream are not searched, because each one would be read again.
        trained = () if run.config.stream else run.data.train
        same = (x for y in trained for x in y.sequences if np.array_equal(x.ids, ids))
        row = {"name": f"row {number}{name}"}
        row |= {"source": next((x.place for x in same), "")}
        row |= {"tokens": len(ids), "targets": int(is_target.sum())}
        rows.append(row | {"pieces": _pieces(run.tokenizer, ids, is_target)})
    return Preview(tuple(rows))


def _sequences(
    run: Run, batch: "ql.train.Batch"
) -> Iterator[tuple[bool, str, np.ndarray, np.ndarray]]:
    """Yields the sequences of a batch.

    Each with whether a row begins, what it is, its tokens, and which are targets.
    """
    is_packed, answers = run.config.packing, batch.answers
    first, second = "chosen", "rejected"
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
                # The two answers of a pair follow each other; packed, they share a row.
                is_second = bool((segment - 1 if is_packed else index) % 2)
                is_new &= not is_second
                if run.config.objective == "kto":
                    is_good = answers[index, segment - 1].max() > 0
                    first = "good answer" if is_good else "bad answer"
                    second = "with the answer of another row"
                name += f", {second if is_second else first}"
            yield is_new, name, batch.ids[index, here], is_target[here]


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
