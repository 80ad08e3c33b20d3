"""Collectives in the text of a compiled program."""

import math
import re

OPERATION = re.compile(
    r"= (\(.*?\)|\S+) (ragged-all-to-all|all-gather|all-reduce|all-to-all|"
    r"collective-broadcast|collective-permute|reduce-scatter)(?:-start)?\("
)
ELEMENT = re.compile(r"\b(\w+)\[([\d,]*)\]")


def operations(text):
    """Returns names and element types, such as `all-gather u8`, in alphabetical order.

    An operation on a tuple lists each of its types once: `all-gather f32 u8`.
    """
    matches = OPERATION.findall(text)

    def format_types(result):
        return " ".join(sorted({t for t, _ in ELEMENT.findall(result)}))

    return sorted(f"{name} {format_types(result)}" for result, name in matches)


def most_floats(text):
    """Returns the size of the largest array that a collective moves, except bytes."""
    parts = [
        part
        for result, _ in OPERATION.findall(text)
        for part in ELEMENT.findall(result)
    ]
    sizes = [
        math.prod(map(int, dims.split(","))) for t, dims in parts if dims and t != "u8"
    ]
    return max(sizes, default=0)


def moved_arrays(text):
    """Returns the name, element type and size of each array of a collective."""
    return [
        (name, dtype, math.prod(int(d) for d in dims.split(",") if d))
        for result, name in OPERATION.findall(text)
        for dtype, dims in ELEMENT.findall(result)
    ]


def collectives(compiled):
    return operations(compiled.as_text())
