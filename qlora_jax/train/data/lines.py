"""Rows that stay in their files, and are turned into tokens when they are asked for."""

import pathlib
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from .encode import Row
from .readers import Rows, file_stamp, jsonl, rows_of, split_name
from .rows import Source


class Lines:
    """The lines of a JSONL file, which may be compressed."""

    def __init__(self, name: str, pieces: Callable[[Any, str], Sequence[Any]]):
        """`pieces` turns a line and its place into rows."""
        self.path, self.pieces = pathlib.Path(name), pieces
        parts = split_name(self.path)
        if parts is None or parts.suffix != ".jsonl":
            raise ValueError(
                "`stream` must be false but for .jsonl and .jsonl.gz files, whose "
                f"lines can be read in any order. Got {name}."
            )
        reader = self._read_unzipped if parts.zipped else self._read
        self.source = Source(name, "line", rows_of(self.path, parts, reader))
        self.at = self.number = 0  # where the last line that was read begins

    def _read_unzipped(self, file: BinaryIO) -> Rows:
        # A gzip file can be read from its start alone, so lines are read from a copy.
        number, name = tempfile.mkstemp()
        self.path = pathlib.Path(name)
        weakref.finalize(self, self.path.unlink, missing_ok=True)
        with open(number, "w+b") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.seek(0)
            yield from self._read(copy)

    def _read(self, file: BinaryIO) -> Rows:
        self._stamp = file_stamp(file.fileno())
        for number, row in jsonl(file):
            self.number = number
            yield number, row
            self.at = file.tell()

    def read(self, at: int) -> Any:
        """Returns the row of the line that begins at a byte."""
        with self.path.open("rb") as file:
            if file_stamp(file.fileno()) != self._stamp:
                raise ValueError(f"{self.path} must not change during a run. It did.")
            file.seek(at)
            return next(jsonl(file))[1]


class Streamed(Sequence[Row]):
    """The rows of files, of which it holds where they are, and their lengths."""

    def __init__(self):
        self._files: list[Lines] = []
        self._numbers = array("q")  # six for each row

    def add(self, lines: Lines, piece: int, row: Row) -> None:
        """Adds a row: a piece of the last line that was read of a file."""
        if lines not in self._files[-1:]:
            self._files.append(lines)
        where = len(self._files) - 1, lines.at, lines.number, piece
        self._numbers.extend((*where, len(row.ids), row.num_trained))

    @property
    def sizes(self) -> np.ndarray:
        """The numbers of tokens and of trained tokens of the rows, `[2, N]`."""
        return np.frombuffer(self._numbers, np.int64).reshape(-1, 6).T[4:]

    def __len__(self) -> int:
        return len(self._numbers) // 6

    def __getitem__(self, index: Any) -> Any:
        start = 6 * range(len(self))[index]
        file, at, number, piece, *_ = self._numbers[start : start + 6]
        lines = self._files[file]
        place = f"{lines.source.name}:{number}"
        return lines.pieces(lines.read(at), place)[piece].row
