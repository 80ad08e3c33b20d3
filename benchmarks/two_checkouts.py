"""Compares the speed of two checkouts of this repository on this machine's CPU.

    python benchmarks/two_checkouts.py BEFORE [AFTER] [--rounds 15] [--markdown FILE]

BEFORE and AFTER are folders; AFTER is this checkout by default. Each case runs in two
processes, one for each checkout with its own benchmarks/worker.py, and they take turns.
The cases are those of cpu.py, steps of a language model, and a step of `qlora-jax
train`; compile_time.py's models are traced and compiled with nothing cached. Prints
ratios of medians from one run. A ratio above 1 means that AFTER is slower.
"""

import json
import os
import pathlib
import subprocess
import sys

from cases import SMOLLM2_135M, TINY_LLAMA
from timing import interleave, make_parser, print_table
from tqdm import tqdm

ROUNDS = 15
HEADER = ["case", "after / before", "before ms", "after ms"]
# Traces and compiles a model of compile_time.py for each line on standard input, each
# time from another depth of the stack (see compile_time.py for the reason).
COMPILE = """\
import functools, json, sys
import compile_time
layers, width, rounds = json.loads(sys.argv[1])
chosen = compile_time.cases(layers, width)
for i, line in enumerate(sys.stdin):
    run = functools.partial(compile_time.seconds, *chosen[line.strip()])
    seconds = compile_time.at_depth(i * compile_time.FRAMES // rounds, run)
    print(json.dumps({"seconds": sum(seconds)}), flush=True)
"""


def cases(quick: bool) -> dict[str, dict]:
    """Returns the cases of worker.py by their descriptions."""
    k, n, rows = (256, 512, (1, 16)) if quick else (2048, 8192, (1, 16, 512))
    named = {}
    for dtype in ("float32", "bfloat16"):
        matrix = {"dtype": dtype, "k": k, "n": n}
        for work in ("forward", "forward + input gradient"):
            for m in rows:
                case = {"kind": "product", "rows": m, "backward": "gradient" in work}
                named[f"{dtype} {work} {m}"] = matrix | case
        case = {"kind": "quantize", "rows": 1, "n": k}
        named[f"{dtype} quantize {k} x {k}"] = matrix | case
    model = TINY_LLAMA if quick else SMOLLM2_135M
    step = {"dtype": "bfloat16", "model": model, "rank": 16, "rows": 4}
    named["step"] = step | {"kind": "model", "length": 75}
    named["step, remat"] = named["step"] | {"peer": "qlora_jax-remat"}
    named["step of train, packed rows"] = step | {"kind": "train", "packed": 2}
    return named


class Process:
    """A process that runs one case in one checkout for each line that it gets."""

    def __init__(self, checkout: pathlib.Path, *arguments: str):
        benchmarks = checkout / "benchmarks"
        paths = os.pathsep.join(map(str, (checkout, benchmarks)))
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=benchmarks,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
        )

    def read(self) -> dict:
        """Returns the next line of JSON."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError(f"The process ended with {self._process.wait()}.")

    def sample(self, request: str) -> float:
        """Runs the case, and returns its seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self.read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(
    name: str, checkouts: list, arguments: list[str], request: str, rounds: int
) -> list[str]:
    """Returns a row of the table."""
    processes = [Process(checkout, *arguments) for checkout in checkouts]
    if request == "time":
        for process in processes:
            process.read()  # the facts that worker.py prints once it has warmed up
    samplers = {p: lambda p=p: p.sample(request) for p in processes}
    before, after = interleave(samplers, rounds).values()
    for process in processes:
        process.close()
    ratio = f"{after.median / before.median:.3f}"
    return [name, ratio, f"{before.median * 1e3:.2f}", f"{after.median * 1e3:.2f}"]


def main() -> None:
    """Runs all cases in turn and prints the table."""
    parser = make_parser(__doc__, ROUNDS)
    here = pathlib.Path(__file__).resolve().parents[1]
    parser.add_argument("before", type=pathlib.Path, help="a checkout")
    parser.add_argument("after", type=pathlib.Path, nargs="?", default=here)
    parser.add_argument(
        "--only", default="", help="run the cases with this in the name"
    )
    args = parser.parse_args()
    checkouts = [args.before.resolve(), args.after.resolve()]
    runs = {}
    for name, case in cases(args.quick).items():
        peer = case.pop("peer", "qlora_jax")
        runs[name] = ["worker.py", peer, json.dumps(case)], "time"
    settings = [*([2, 64] if args.quick else [32, 256]), args.rounds]
    for name in ("dense", "LoRA on float", "QLoRA, nf4"):
        runs[f"compile: {name}"] = ["-c", COMPILE, json.dumps(settings)], name
    rows = []
    runs = {name: run for name, run in runs.items() if args.only in name}
    for name, run in tqdm(runs.items(), disable=None):
        rows.append(compare(name, checkouts, *run, args.rounds))
        tqdm.write(" ".join(rows[-1]))  # a run takes most of an hour
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
