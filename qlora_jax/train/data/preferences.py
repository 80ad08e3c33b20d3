"""Answers of rows of preferences, as TRL writes them."""

import itertools
from collections.abc import Mapping
from typing import Any

from .kinds import KINDS, LABELLED, PAIRS, Fields

_KINDS = {"sft": KINDS, "kto": PAIRS | LABELLED}
_KINDS |= dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), PAIRS)


def kinds_for(objective: str) -> Mapping[str, Any]:
    """Returns the kinds of rows for an objective."""
    if objective not in _KINDS:
        raise ValueError(
            f"`objective` must be one of {', '.join(_KINDS)}. Got {objective!r}."
        )
    return _KINDS[objective]


def find_answers(fields: Fields) -> list[tuple[str, bool, Fields]]:
    """Returns each answer of a row: its key, whether it is good, and its fields."""
    values = fields.values
    if fields.kind in LABELLED:
        label, answer = values["label"], fields._replace(kind="prompt/completion")
        if not isinstance(label, int) or label not in (0, 1):
            raise ValueError(f"`label` must be true or false. Got {label!r:.40}.")
        return [("completion", bool(label), answer)]
    kind, prompt, chosen, rejected = _with_prompt(values)
    row = lambda x: Fields(kind, values | {"prompt": prompt, "completion": x}, [])
    return [("chosen", True, row(chosen)), ("rejected", False, row(rejected))]


def _with_prompt(values: Mapping[str, Any]) -> tuple[str, Any, Any, Any]:
    """Returns a kind, a prompt and two answers; the prompt may be what they share."""
    prompt, chosen, rejected = (values[x] for x in ("prompt", "chosen", "rejected"))
    if not isinstance(chosen, str | list) or type(chosen) is not type(rejected):
        raise ValueError("`chosen` and `rejected` must both be text or messages.")
    if chosen == rejected:
        raise ValueError(f"`chosen` and `rejected` must differ. Got {chosen!r:.80}.")
    # Some data sets have the prompt also as a text, which the messages hold.
    is_text = isinstance(prompt, str) and isinstance(chosen, list)
    if prompt is not None and not is_text:
        return "prompt/completion", prompt, chosen, rejected
    pairs = itertools.takewhile(
        lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)
    )
    size = sum(1 for _ in pairs)
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1  # most tokenizers join a space to the word after it
    shared = chosen[:size]
    holds = lambda x: isinstance(x, dict) and prompt in x.values()
    if not shared or is_text and not any(map(holds, shared)):
        raise ValueError(
            "it must have a `prompt`, or `chosen` and `rejected` must begin with it. "
            f"Got {chosen!r:.80} and {rejected!r:.80}."
        )
    kind = "text" if isinstance(chosen, str) else "prompt/completion"
    return kind, shared, chosen[size:], rejected[size:]
