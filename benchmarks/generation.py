"""Tokens per second of `qlora-jax generate`, transformers, bitsandbytes and llama.cpp.

    python benchmarks/generation.py --torch-python PATH [--newest-python PATH]
        [--llama-python PATH]

A language model of SmolLM2-135M's shape with random weights generates greedily, after a
prompt of 32 tokens. The peers of a row are separate processes, which take turns.
transformers runs a plain loop over its model, without `generate`. llama.cpp has the
trained weights in Q4_0, and computes in its own dtypes whatever the row's dtype.
"""

import sys

from cases import SMOLLM2_135M, TINY_LLAMA
from timing import (
    ROUNDS,
    find_python,
    interleave,
    make_parser,
    mib,
    print_table,
    start_worker,
)
from tqdm import tqdm

FORMS = [  # dtype, format of the layers, rank of the adapter
    (dtype, fmt, rank)
    for dtype in ("float32", "bfloat16")
    for fmt in (None, "nf4", "int4")
    for rank in (0, 16)
]
HEADER = ["layers", "adapter", "peer", "tokens/s", "fastest", "peak MiB", "bits"]


def measure(case: dict, pythons: dict[str, str], rounds: int) -> list[list[str]]:
    """Returns a row for each peer of a form."""
    torch = "torch" if case["fmt"] is None else "bitsandbytes"
    peers = {"torch": torch, "llama.cpp": "llama.cpp"}
    workers = {
        name: start_worker(python, peers.get(name, "qlora_jax"), case)
        for name, python in pythons.items()
        if name != "llama.cpp" or (case["fmt"] and not case["rank"])
    }
    form = case["fmt"] or "float"
    start = [
        f"{form}, {case['dtype']}",
        f"rank {case['rank']}" if case["rank"] else "-",
    ]
    rows = []
    try:
        ready = {n: w for n, w in workers.items() if "error" not in w.facts}
        times = interleave({n: w.sample for n, w in ready.items()}, rounds)
        for name, worker in workers.items():
            versions = worker.facts.get("versions", {})
            title = f"qlora_jax, JAX {versions.get('jax')}"
            if name == "torch":
                title = "transformers"
                if torch == "bitsandbytes":
                    title += ", bitsandbytes nf4"
            if name == "llama.cpp":
                title = "llama.cpp, q4_0"
            if name not in ready:
                rows.append([*start, title, worker.facts["error"], "-", "-", "-"])
                continue
            speed = [
                case["tokens"] / t for t in (times[name].median, times[name].fastest)
            ]
            peak = mib(worker.ask("memory")["peak"])
            bits = f"{worker.facts['bits']:.2f}"
            rows.append([*start, title, *(f"{s:.1f}" for s in speed), peak, bits])
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def main() -> None:
    """Runs the forms and prints the table."""
    parser = make_parser(__doc__, ROUNDS)
    parser.add_argument(
        "--torch-python", help="a Python with torch, transformers, bitsandbytes, peft"
    )
    parser.add_argument("--newest-python", help="a Python with another JAX")
    parser.add_argument("--llama-python", help="a Python with xllamacpp, qlora_jax")
    parser.add_argument("--only", default="", help="forms whose name holds this")
    args = parser.parse_args()
    pythons = {"here": sys.executable}
    if args.newest_python:
        pythons["newest"] = args.newest_python
    if (torch := find_python(args.torch_python, "bitsandbytes")) is not None:
        pythons["torch"] = torch
    if (llama := find_python(args.llama_python, "xllamacpp")) is not None:
        pythons["llama.cpp"] = llama
    model = TINY_LLAMA if args.quick else SMOLLM2_135M
    rows = []
    for dtype, fmt, rank in tqdm(FORMS, disable=None):
        case = {"kind": "generate", "dtype": dtype, "fmt": fmt, "rank": rank}
        if args.only in f"{fmt or 'float'}, {dtype}, {rank}":
            case |= {"model": model, "tokens": 16}
            rows += measure(case, pythons, args.rounds)
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
