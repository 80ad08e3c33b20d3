"""Helpers of the benchmarks: interleaved timing, workers, the machine, tables.

A *round* runs every contestant once, in an order that rotates by one each round, so
that other load on the machine affects all of them alike. Ratios are ratios of medians
over the rounds of one run.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROUNDS = 9
PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "qwix",
    "ejkernel",
    "torch",
    "bitsandbytes",
    "peft",
)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, fastest and median of the rounds."""

    fastest: float
    median: float


def timed(call, *, at_least: float = 1e-2):
    """Returns a function that measures seconds per call, with short calls repeated.

    Each sample starts with an uncounted call, since another contestant has filled the
    caches, and the threads of this one were idle.

    Args:
        call: Runs the work and waits for it. It is called a few times here, to warm up.
        at_least: Seconds that one sample takes, by repeating the call.
    """
    call()
    seconds = min(_seconds(call, 1) for _ in range(2))
    repeats = max(1, math.ceil(at_least / max(seconds, 1e-6)))
    return lambda: _seconds(call, repeats)


def _seconds(call, repeats: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def interleave(samplers: dict, rounds: int = ROUNDS) -> dict:
    """Returns a Timing for each name, from `rounds` rounds of every sampler."""
    samples = {name: [] for name in samplers}
    names = list(samplers)
    for i in range(rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            samples[name].append(samplers[name]())
    return {
        name: Timing(min(values), statistics.median(values))
        for name, values in samples.items()
    }


def versions() -> dict[str, str]:
    """Returns the installed versions of the compared packages, and Python's."""
    version_of = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            version_of[name] = version(name)
        except PackageNotFoundError:
            continue
    return version_of


def machine() -> str:
    """Returns the processor's name, its logical cores and instruction sets."""
    name, cores, flags = platform.machine(), 0, set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name, cores = value.strip(), cores + 1
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    extensions = [
        f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags
    ]
    return f"{name}, {cores or '?'} logical cores ({' '.join(extensions)})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, padded so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def format_line(row):
        return (
            "| "
            + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([format_line(header), rule, *map(format_line, rows)])


def mib(size: float | None) -> str:
    """Returns a size in MiB as text."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def make_parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that all benchmarks have.

    Args:
        doc: The module's docstring.
        rounds: The default number of rounds.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it")
    parser.add_argument("--markdown", metavar="FILE", help="write the report here too")
    return parser


def print_table(header: list[str], rows: list[list[str]], path: str | None) -> None:
    """Prints a table with the machine and the versions, and writes it to a file."""
    facts = ", ".join(f"{name} {version}" for name, version in versions().items())
    report = f"{machine()}\n{facts}\n\n{table(header, rows)}"
    print(report)
    write_markdown(path, report)


def write_markdown(path: str | None, text: str) -> None:
    """Writes the report to a file, if a path is given."""
    if path is not None:
        Path(path).write_text(text + "\n")


class Worker:
    """A contestant in a separate process, idle between samples.

    Attributes:
        facts: What the worker reported when it was ready; it has "error" if it failed.
    """

    def __init__(self, command: list[str], checkout: Path | None = None):
        """Starts a command that answers as worker.py does.

        If `checkout` is a path, the command runs in its folder `benchmarks`, and
        imports its modules.
        """
        settings, folder = {"JAX_PLATFORMS": "cpu"}, None
        if checkout is not None:
            # `python -c` searches the working directory before `PYTHONPATH`, so it must
            # not be the root of another checkout.
            folder = checkout / "benchmarks"
            settings["PYTHONPATH"] = os.pathsep.join(map(str, (checkout, folder)))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
            env=os.environ | settings,
        )
        self.facts = self._read()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"the worker ended ({self._process.wait()})"}

    def ask(self, request: str) -> dict:
        """Returns the answer to "time", "memory" or "error"."""
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def sample(self) -> float:
        """Runs the call, and returns seconds per call."""
        return self.ask("time")["seconds"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def start_worker(python: str, peer: str, case: dict) -> Worker:
    """Returns a worker that runs a case (see cases.py) of a peer."""
    script = str(Path(__file__).with_name("worker.py"))
    return Worker([python, script, peer, json.dumps(case)])


def has_module(python: str | None, module: str) -> bool:
    """Returns whether a Python interpreter can import a module."""
    if python is None:
        return False
    code = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return run.stdout.strip() == "True"


def find_python(requested: str | None, module: str) -> str | None:
    """Returns `requested`, or else this interpreter, if it can import `module`."""
    for python in (requested, sys.executable):
        if has_module(python, module):
            return python
    return None
