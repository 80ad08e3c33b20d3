"""Where tokens stand in their text."""

from typing import NamedTuple

from .templates import Tokenizer


class Spans(NamedTuple):
    """Tokens, and which characters of the text each covers.

    Attributes:
        ids: The tokens.
        starts: The first character of each. White space that the tokenizer counts out
            of a token's place belongs to the token behind it.
        ends: The end of each.
        added: Whether the tokenizer added it: no text stands for it.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]
    added: list[bool]


def token_spans(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> Spans:
    """As `Tokenizer.encode`, with the place of each token in the text."""
    found = tokenizer.inner.encode(text, add_special_tokens=add_special_tokens)
    starts, ends, added, last = [], [], [], 0
    for special, (start, end) in zip(
        found.special_tokens_mask, found.offsets, strict=True
    ):
        added.append(bool(special) and start == end)
        starts.append(last if added[-1] else min(start, last))
        last = last if added[-1] else max(last, end)
        ends.append(last)
    return Spans(found.ids, starts, ends, added)
