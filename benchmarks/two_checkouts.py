"""Compares the speed of two checkouts of this repository on this machine's CPU.

    python benchmarks/two_checkouts.py BEFORE [AFTER] [--rounds 15] [--markdown FILE]

BEFORE and AFTER are folders; AFTER is this checkout by default. Each case runs in two
processes, one for each checkout with its own benchmarks/worker.py, and they take turns.
The cases are those of cpu.py, steps of a language model, and a step of `qlora-jax
train`; compile_time.py's models are traced and compiled with nothing cached. Prints
ratios of medians from one run. A ratio above 1 means that AFTER is slower.
"""

import json
import pathlib
import sys

from cases import SMOLLM2_135M, TINY_LLAMA
from timing import Worker, interleave, make_parser, print_table
from tqdm import tqdm

ROUNDS = 15
HEADER = ["case", "after / before", "before ms", "after ms"]
# Answers as worker.py does. Each sample traces and compiles a model of compile_time.py
# from another depth of the stack (see there for the reason).
COMPILE = """\
import functools, json, sys
import compile_time
name, (layers, width, rounds) = sys.argv[1], json.loads(sys.argv[2])
case = compile_time.cases(layers, width)[name]
run = functools.partial(compile_time.seconds, *case)
print("{}", flush=True)
for i, line in enumerate(sys.stdin):
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


def compare(name: str, workers: list[Worker], rounds: int) -> list[str]:
    """Returns a row of the table; `workers` are those of the two checkouts."""
    for worker in workers:
        if "error" in worker.facts:
            raise RuntimeError(f"{name}: {worker.facts['error']}")
    samplers = {worker: worker.sample for worker in workers}
    before, after = interleave(samplers, rounds).values()
    for worker in workers:
        worker.close()
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
    python_arguments = {}  # by the name of the case; paths are relative to benchmarks
    for name, case in cases(args.quick).items():
        peer = case.pop("peer", "qlora_jax")
        python_arguments[name] = ["worker.py", peer, json.dumps(case)]
    settings = json.dumps([*([2, 64] if args.quick else [32, 256]), args.rounds])
    for name in ("dense", "LoRA on float", "QLoRA, nf4"):
        python_arguments[f"compile: {name}"] = ["-c", COMPILE, name, settings]
    rows = []
    chosen = [name for name in python_arguments if args.only in name]
    for name in tqdm(chosen, disable=None):
        command = [sys.executable, *python_arguments[name]]
        workers = [Worker(command, checkout) for checkout in checkouts]
        rows.append(compare(name, workers, args.rounds))
        tqdm.write(" ".join(rows[-1]))  # a run takes most of an hour
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
