"""What a compiled program moves between devices, with all iterations of loops."""

import collections
import math
import re
from collections.abc import Iterable, Iterator

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
_NAMES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
_OPERATION = re.compile(rf"= (.*?) (ragged-all-to-all|{_NAMES})(-start)?\(")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_LOOP = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')  # XLA on CPUs
_CONSTANT = re.compile(r"%?([\w.\-]+) = ([su]32)\[\]\S* constant\((\d+)\)")
_LESS = re.compile(
    r"ROOT .* compare\((?:.*?[ %])?([\w.\-]+), (?:.*[ %])?([\w.\-]+)\), direction=LT"
)
_ELEMENT = re.compile(r"%?([\w.\-]+) = .*get-tuple-element\(.*\), index=(\d+)")
_ADD = re.compile(
    r"%?([\w.\-]+) = .* add\((?:.*?[ %])?([\w.\-]+), (?:.*[ %])?([\w.\-]+)\)"
)
_RESULTS = re.compile(r"ROOT .* tuple\((.*?)\)")
_START = 'custom_call_target="AsyncCollectiveStart"'
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


def collectives(text: str) -> list[dict]:
    """Counts a program's collectives by operation and element type.

    Args:
        text: The optimized HLO, as `compiled.as_text()` gives it.

    Returns:
        Rows with `operation`, `dtype`, how often it runs in the program (`count`) and
        the `bytes` of its results on one device: of an all-gather, the gathered array.

    Raises:
        ValueError: If a loop with a collective in it does not count from 0 to a
            constant. JAX's scans do, and so do the loops in which XLA multiplies
            gathered parts one by one.

    Example:
        >>> collectives('''ENTRY %main (x: u8[4]) -> u8[16] {
        ...   ROOT %y = u8[16]{0} all-gather(%x), dimensions={0}
        ... }''')
        [{'operation': 'all-gather', 'dtype': 'u8', 'count': 1, 'bytes': 16}]
    """
    computations = dict(_computations(text))
    fused = {*re.findall(r" fusion\(.*?\bcalls=%?([\w.\-]+)", text)}
    totals: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, times in _runs(text, computations).items():
        # A collective that XLA fuses with other work is in three computations: where it
        # starts, where it continues and where it ends.
        if name in fused and not any(_START in x for x in computations[name]):
            continue
        for operation, arrays in _operations(computations[name]):
            if times is None:
                raise ValueError(
                    f"a loop around {operation} must count to a constant. Got another."
                )
            for dtype in {dtype for dtype, _ in arrays}:
                size = sum(_bytes(*array) for array in arrays if array[0] == dtype)
                total = totals[operation, dtype]
                total[0] += times
                total[1] += times * size
    return [
        {"operation": operation, "dtype": dtype, "count": count, "bytes": size}
        for (operation, dtype), (count, size) in sorted(totals.items())
    ]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.split("\n"):
        if head := _HEAD.match(line):
            name, lines = head[1], []
        elif line == "}" and name:  # kernels' metadata has lines that begin with one
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _runs(text: str, computations: dict[str, list[str]]) -> dict[str, int | None]:
    """Returns how often each computation runs; None inside a loop of unknown length."""
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    if entry is None:
        raise ValueError("`text` must have an ENTRY computation. Got none.")
    runs: dict[str, int | None] = collections.defaultdict(int)

    def visit(name: str, times: int | None) -> None:
        before = runs[name]
        runs[name] = None if times is None or before is None else before + times
        for line in computations.get(name, ()):
            loop = _LOOP.search(line)
            for name_list, single in _CALLED.findall(line):
                for called in re.split(r",\s*", name_list) if name_list else [single]:
                    called = called.strip().removeprefix("%")
                    inner = times
                    if loop and called == loop[2]:
                        trip_count = _TRIP_COUNT.search(line)
                        trips = int(trip_count[1]) if trip_count else None
                        trips = trips or _trips(
                            *(computations[x] for x in loop.groups())
                        )
                        is_known = times is not None and trips is not None
                        inner = times * trips if is_known else None  # pyright: ignore
                    visit(called, inner)

    visit(entry[1], 1)
    return {name: times for name, times in runs.items() if name in computations}


def _trips(condition: Iterable[str], body: Iterable[str]) -> int | None:
    """Returns the trip count of a loop that counts from 0 to a constant; else None."""
    test, work = "\n".join(condition), "\n".join(body)
    if not (comparison := _LESS.search(test)):
        return None
    limits = {name: (kind, int(size)) for name, kind, size in _CONSTANT.findall(test)}
    if comparison[2] not in limits:
        return None
    kind, limit = limits[comparison[2]]
    if kind == "s32":  # a scan of JAX, which counts by ones
        return limit
    step = _step(work, dict(_ELEMENT.findall(test)).get(comparison[1]))
    return -(-limit // step) if step else None


def _step(body: str, index: str | None) -> int | None:
    """Returns what a loop's body adds to an element of what the loop carries."""
    results = _RESULTS.search(body)
    if index is None or results is None:
        return None
    names = [x.split("%")[-1].split()[-1] for x in results[1].split(",")]
    elements = dict(_ELEMENT.findall(body))
    constants = {name: size for name, _, size in _CONSTANT.findall(body)}
    for name, *terms in _ADD.findall(body):
        if name == names[int(index)]:
            amounts = [constants[x] for x in terms if x in constants]
            same = any(elements.get(x) == index for x in terms)
            return int(amounts[0]) if amounts and same else None
    return None


def _operations(lines: Iterable[str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yields the name of each collective, and its arrays."""
    for line in lines:
        if not (match := _OPERATION.search(line)):
            continue
        result, operation, start = match.groups()
        arrays = _ARRAY.findall(result)
        # Results of asynchronous operations include operands; of permutes, also flags.
        if start and result.startswith("(") and operation != "all-reduce":
            if operation == "collective-permute":
                arrays = arrays[1:2]
            else:
                arrays = arrays[len(arrays) // 2 :]
        yield operation, arrays


def _bytes(dtype: str, dims: str) -> int:
    digits = re.search(r"\d+", dtype)
    bits = BITS.get(dtype) or (int(digits[0]) if digits else 0)
    return math.prod(map(int, filter(None, dims.split(",")))) * bits // 8
