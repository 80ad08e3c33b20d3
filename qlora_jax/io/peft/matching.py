"""Matches names of modules as PEFT does, in a limited time.

The settings come from files, which may be hostile. Names are looked up in sets, because
there may be any number of them. Matching a regular expression may never end, and Python
cannot stop it, so another process does that.
"""

import itertools
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import TypeVar

from ..files import CheckpointError

N = TypeVar("N", int, float)

MAX_SECONDS = 10
_MATCH = """
import json, re, sys
regexes, names = json.load(sys.stdin)
matches = []
for regex in map(re.compile, regexes):
    found = [(name, regex.fullmatch(name)) for name in names]
    matches.append({name: m.groupdict().get("layer") for name, m in found if m})
json.dump(matches, sys.stdout)
"""


def is_plain(pattern: str) -> bool:
    """Returns whether a pattern is a name, and not a regular expression.

    A dot of a name matches only a dot here. In PEFT, it matches every character.
    """
    return re.fullmatch(r"[\w.-]*", pattern) is not None


def layer_regex(prefix: str) -> str:
    """Returns the expression for the names in layers, with a group for the number."""
    # Without a prefix, the first number between dots is the layer's.
    start = rf"(?:^|.*?\.){prefix}" if prefix else r".*?\.[^.]*"
    return rf"{start}\.(?P<layer>\d+)\..*"


def key_regex(key: str) -> str:
    """Returns the expression of a key of `rank_pattern`, for the end of a name."""
    return rf"(.*\.)?({key})$"


def find_matches(
    setting: str, regexes: Sequence[str], names: Iterable[str]
) -> list[dict[str, str | None]]:
    """Returns the names that each expression matches, with their groups "layer"."""
    if not regexes:
        return []
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    request = json.dumps([regexes, [*names]])
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, timeout=MAX_SECONDS, text=True
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"`{setting}` must have regular expressions that take at most "
            f"{MAX_SECONDS} seconds. Got {[*regexes]!r:.200}."
        ) from None
    done.check_returncode()
    return json.loads(done.stdout)


def targeted(
    names: Iterable[str],
    targets: str | tuple[str, ...],
    setting: str = "target_modules",
    layers: Collection[int] | None = None,
    layer_prefixes: tuple[str, ...] = (),
) -> set[str]:
    """Returns the names that PEFT's `target_modules` match.

    A string is a regular expression for full names. A tuple holds full names, or their
    ends after a dot; ends match in `layers` only (None for all).
    """
    if isinstance(targets, str):
        return {*find_matches(setting, [targets], names)[0]} if targets else set()
    ends = {*targets}
    matched = {name for name in names if not ends.isdisjoint(ends_of(name))}
    if layers is None:
        return matched
    numbers = layers_of(matched - ends, layer_prefixes)
    in_layers = {name for name, layer in numbers.items() if layer in {*layers}}
    return matched & ends | in_layers


def layers_of(
    names: Iterable[str], layer_prefixes: tuple[str, ...]
) -> dict[str, int | None]:
    """Returns the layers of the names that are in one."""
    regexes = [layer_regex(prefix) for prefix in layer_prefixes or ("",)]
    numbers: dict[str, int | None] = {}
    # The first prefix that matches decides, as in PEFT.
    for matches in reversed(find_matches("layers_pattern", regexes, names)):
        # A prefix with "|" may match without the group of the number.
        numbers |= {name: int(x) if x else None for name, x in matches.items()}
    return numbers


def ends_of(name: str) -> list[str]:
    """Returns a name and its ends after each dot."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def match_keys(
    setting: str, keys: Iterable[str], names: Collection[str]
) -> dict[str, Collection[str]]:
    """Returns the names that each key of `rank_pattern` or `alpha_pattern` matches."""
    # A key matches the end of a name after a dot, and may be a regular expression.
    by_end = defaultdict(list)
    for name in names:
        for end in ends_of(name):
            by_end[end].append(name)
    matches: dict[str, Collection[str]] = {key: by_end.get(key, ()) for key in keys}
    regexes = [key for key in matches if not is_plain(key)]
    found = find_matches(setting, [*map(key_regex, regexes)], names)
    return matches | dict(zip(regexes, found, strict=True))


def first_matches(
    setting: str, patterns: Mapping[str, N], names: Collection[str], default: N
) -> dict[str, N]:
    """Returns the value of the first key that matches each name."""
    values = dict.fromkeys(names, default)
    matches = match_keys(setting, patterns, names)
    for key in reversed([*patterns]):
        values |= dict.fromkeys(matches[key], patterns[key])
    return values


def saved_as(parameter: str, modules_to_save: Container[str]) -> list[str]:
    """Returns those of PEFT's `modules_to_save` that hold a parameter."""
    # PEFT compares ends without a dot: "norm" also saves "input_layernorm".
    parts = parameter.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    ends = (module[i:] for module in modules for i in range(len(module)))
    return [end for end in ends if end in modules_to_save]


def is_excluded_as_saved(module: str, modules_to_save: Container[str]) -> bool:
    """Returns whether PEFT adds no adapter to a module because it is saved."""
    # Unlike `saved_as`, this compares only whole parts of names, between dots.
    parts = module.split(".")
    spans = itertools.combinations(range(len(parts) + 1), 2)
    return any(".".join(parts[i:j]) in modules_to_save for i, j in spans)
