"""Decodes tokens that come one at a time."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no UTF-8


class TextStream:
    """Turns tokens into pieces of text that never end within a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # of the last piece
        self._end = 0  # of the last piece

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now complete, perhaps none."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        return "" if text.endswith(_INCOMPLETE) else self._cut(text)

    def rest(self) -> str:
        """Returns the text held back, once there are no more tokens."""
        return self._cut(self._decode(self._ids[self._start :]))

    def _cut(self, text: str) -> str:
        # Decoders treat the first token of a text differently, so the tokens of the
        # piece before are decoded too.
        known = self._decode(self._ids[self._start : self._end])
        self._start, self._end = self._end, len(self._ids)
        return text[len(known) :]
