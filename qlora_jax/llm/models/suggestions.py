"""Suggests the name that a user may have meant."""

import difflib
from collections.abc import Collection


def did_you_mean(name: str, choices: Collection[str]) -> str:
    """Returns " Did you mean `x`?", or an empty text if no choice is similar."""
    # "lr" stands for "learning_rate".
    initials = {"".join(x[:1] for x in c.split("_")): c for c in choices if "_" in c}
    near = difflib.get_close_matches(name, choices, 1, cutoff=0.75)
    match = near[0] if near else initials.get(name)
    return "" if match is None else f" Did you mean `{match}`?"
