"""Cuts or refuses rows that are too long."""

from .encode import Encoded, Row
from .rows import Source, listing


def cut_row(kind: str, one: Encoded, max_length: int, how: str) -> list[Encoded]:
    """Returns the pieces of a row that is too long; one to refuse as it is."""
    ids, labels, place, *_ = row = one.row
    if row.longest <= max_length or how == "refuse":
        return [one]
    if how == "split":
        if kind != "text":
            return [one]
        # A row begins with the last token of the row before, which is predicted there:
        # each token but the first of a text is predicted once.
        starts = range(0, len(ids) - 1, max_length - 1)
        part = lambda x, at: x[at : at + max_length]
        return [Encoded(Row(part(ids, x), part(labels, x), place)) for x in starts]
    row = row.truncated(max_length)
    is_kept = how == "truncate" and row.is_trained
    return [Encoded(row, None, one.straddles)] * is_kept  # its answer may be cut


class Cuts:
    """Cuts the rows of a source that are too long, and counts."""

    def __init__(self, source: Source, max_length: int, how: str):
        self._name, self._most, self._how = source.name, max_length, how
        self._rows = self._pieces = self._long = self._longest = 0
        self._refused: list[str] = []
        self._untrained: list[str] = []

    def cut(self, kind: str, one: Encoded) -> list[Encoded]:
        """Returns the pieces of a row."""
        pieces = cut_row(kind, one, self._most, self._how)
        size, place = one.row.longest, one.row.place
        self._rows, self._pieces = self._rows + 1, self._pieces + len(pieces)
        if size > self._most:
            self._long, self._longest = self._long + 1, max(self._longest, size)
            if pieces and pieces[0] is one:
                self._refused.append(f"{place} ({size:,} tokens)")
        self._untrained += [place for x in pieces if not x.row.is_trained]
        return pieces

    def end(self, notes: list[str]) -> None:
        """Refuses rows that are wrong, and notes what was cut."""
        name, most, long = self._name, self._most, self._long
        if self._refused:
            raise ValueError(
                f"rows must have at most `max_length` = {most} tokens; the longest has "
                f"{self._longest:,}. Raise it, or set `too_long` to drop or truncate, "
                "or to split, which is for rows of `text`.\n  " + listing(self._refused)
            )
        if not self._pieces:
            raise ValueError(
                f"{name} must have rows of at most {most} tokens. Got none."
            )
        if self._untrained:
            raise ValueError(
                f"rows of {name} must have a token to train on. None in:\n  "
                + listing(self._untrained)
            )
        dropped = self._rows - self._pieces
        if long and self._how == "split":
            notes.append(
                f"{name}: texts of more than {most} tokens go on in the next row: "
                f"{self._pieces:,} rows of {self._rows:,} texts."
            )
        elif long:
            notes.append(
                f"{name}: of {long:,} rows with more than {most} tokens, {dropped:,} "
                f"are dropped and {long - dropped:,} truncated; the longest has "
                f"{self._longest:,}."
            )
