"""This library against dense JAX, qwix, ejkernel and bitsandbytes, on this CPU.

    python benchmarks/peers.py [--torch-python PATH] [--qwix-python PATH]
        [--ejkernel-python PATH]

Runs the same product and the same QLoRA training step in every peer that this or the
given Python can import, and prints ratios to dense JAX. The peers of a table are
separate processes, which take turns.
"""

import sys

from cases import SMOLLM2_135M, TINY_LLAMA
from timing import (
    ROUNDS,
    Worker,
    find_python,
    interleave,
    machine,
    make_parser,
    mib,
    start_worker,
    table,
    write_markdown,
)
from tqdm import tqdm

PRODUCT_PEERS = (
    "dense",
    "dense-best",
    "qlora_jax",
    "qwix",
    "ejkernel",
    "bitsandbytes",
    "torch",
)
STEP_PEERS = (
    "dense",
    "qlora_jax",
    "qwix",
    "dense-unrolled",
    "qlora_jax-unrolled",
    "qwix-unrolled",
    "bitsandbytes",
    "torch",
)
MODEL_PEERS = (
    "dense",
    "dense-remat",
    "qlora_jax",
    "qlora_jax-remat",
    "bitsandbytes",
    "torch",
)
TRAIN_PEERS = (
    "dense",
    "dense-remat",
    "qlora_jax",
    "qlora_jax-remat",
    "bitsandbytes",
    "bitsandbytes-remat",
)
HEADER = [
    "peer",
    "ratio to dense",
    "min ms",
    "median ms",
    "temporaries MiB",
    "process peak MiB",
    "bits a weight",
    "error to float",
]
NOTES = """\
Ratio: medians of one run, to `dense` JAX as it is written (above 1 is slower).
`dense-best` asks for float32 results, which in bfloat16 is the faster form on some
versions; the dense training step, plain LoRA on a float base, uses that form. `torch`
is a dense torch layer, in steps with PEFT's plain LoRA. Unless a peer's name says
unrolled, JAX scans over the layers.
Temporaries: `memory_analysis()` of the compiled function. Process peak: the high-water
mark of the whole process, its libraries included, while the calls are timed. Bits a
weight are counted from the buffers on this device; qwix's uint4 takes a byte a value in
a CPU's memory with JAX 0.10.2 (4.5 bits in float32, 4.25 in bfloat16, where packed).
The language model has SmolLM2-135M's shape and random weights, LoRA of rank 16 on all
seven kinds of layer and the loss of all tokens; `dense` and `torch` (transformers) are
plain LoRA, -remat recomputes each layer in the backward pass.
A fine-tuning step is one of `qlora-jax train` (its `train.make_step`, chunked loss on
the answers, clipping) on rows of several sequences, and the same batch, mask, loss and
clipping in transformers with PEFT.
Error: relative Frobenius distance of the output (in steps: of the stack before
training) from float32 NumPy on the unquantized weights."""


def cases(quick: bool) -> list[tuple[str, dict, tuple[str, ...]]]:
    """Returns (title, case, peers) for every table."""
    k, n, rows = (512, 1024, (1, 16)) if quick else (2048, 8192, (1, 16, 512))
    stacks = ((2, 256), (4, 256)) if quick else ((2, 2048), (16, 1024))
    all_cases = []
    for dtype in ("float32", "bfloat16"):
        for m in rows:
            for backward in (False, True):
                case = {"kind": "product", "dtype": dtype, "rows": m, "k": k, "n": n}
                direction = "forward + input gradient" if backward else "forward"
                title = f"{direction}, {m} x {k} x {n}, {dtype}"
                all_cases.append((title, case | {"backward": backward}, PRODUCT_PEERS))
    for dtype in ("float32", "bfloat16"):
        for layers, width in stacks:
            m = 64 if quick else 512
            case = {"kind": "step", "dtype": dtype, "rows": m, "rank": 16}
            case |= {"layers": layers, "width": width}
            title = f"training step, {layers} layers of {width}, {m} rows, {dtype}"
            all_cases.append((title, case, STEP_PEERS))
    model = TINY_LLAMA if quick else SMOLLM2_135M
    for dtype in ("float32", "bfloat16"):
        case = {"kind": "model", "dtype": dtype, "rows": 16, "length": 75, "rank": 16}
        title = f"training step of a language model, 16 x 75 tokens, {dtype}"
        all_cases.append((title, case | {"model": model}, MODEL_PEERS))
    for dtype in ("float32", "bfloat16"):
        case = {"kind": "train", "dtype": dtype, "rows": 4, "packed": 4, "rank": 16}
        title = (
            f"fine-tuning step on packed rows, 16 sequences of 64 to 84 tokens, {dtype}"
        )
        all_cases.append((title, case | {"model": model}, TRAIN_PEERS))
    return all_cases


def python_of(peer: str, pythons: dict[str, str | None]) -> str | None:
    """Returns the interpreter that runs a peer."""
    name = peer.partition("-")[0]
    name = {"torch": "bitsandbytes"}.get(name, name)
    return pythons.get(name, sys.executable)


def run_case(case: dict, peers, pythons: dict, rounds: int) -> tuple[list, dict]:
    """Returns the rows of a table, and the versions that the workers reported."""
    workers = {}
    try:
        for peer in peers:
            python = python_of(peer, pythons)
            if python is not None:
                workers[peer] = start_worker(python, peer, case)
        return measure(workers, rounds)
    finally:
        for worker in workers.values():
            worker.close()


def measure(workers: dict[str, Worker], rounds: int) -> tuple[list, dict]:
    """Returns the table's rows, and versions by peer."""
    ready = {peer: w for peer, w in workers.items() if "error" not in w.facts}
    times = interleave({peer: w.sample for peer, w in ready.items()}, rounds)
    dense = times["dense"].median if "dense" in times else float("nan")
    rows, versions = [], {}
    for peer, worker in workers.items():
        if peer not in ready:
            rows.append([peer, worker.facts["error"], *["-"] * (len(HEADER) - 2)])
            continue
        memory = worker.ask("memory")
        error = worker.ask("error")["error_to_float"]
        time = times[peer]
        versions[peer.partition("-")[0]] = worker.facts["versions"]
        rows.append(
            [
                peer,
                f"{time.median / dense:.2f}",
                f"{time.fastest * 1e3:.2f}",
                f"{time.median * 1e3:.2f}",
                mib(worker.facts.get("temporaries")),
                mib(memory["peak"]),
                f"{worker.facts['bits']:.3f}",
                "-" if error is None else f"{error:.1e}",
            ]
        )
    return rows, versions


def main() -> None:
    """Runs the cases and prints the report."""
    parser = make_parser(__doc__, ROUNDS)
    parser.add_argument(
        "--torch-python", help="a Python with torch, bitsandbytes, peft"
    )
    parser.add_argument("--qwix-python", help="a Python with qwix")
    parser.add_argument("--ejkernel-python", help="a Python with ejkernel")
    parser.add_argument("--only", default="", help="run tables whose title holds this")
    args = parser.parse_args()
    all_cases = cases(args.quick)
    chosen = [case for case in all_cases if args.only in case[0]]
    if not chosen:
        titles = [title for title, _, _ in all_cases]
        parser.error(f"`--only` must be part of one of {titles}. Got {args.only!r}.")
    pythons = {
        "qwix": find_python(args.qwix_python, "qwix"),
        "ejkernel": find_python(args.ejkernel_python, "ejkernel"),
        "bitsandbytes": find_python(args.torch_python, "bitsandbytes"),
    }
    lines = [f"Machine: {machine()}; {args.rounds} rounds"]
    for name, python in pythons.items():
        if python is None:
            lines.append(f"{name} was left out: no Python here or named can import it.")
    versions_of = {}
    for title, case, peers in tqdm(chosen, disable=None):
        rows, versions = run_case(case, peers, pythons, args.rounds)
        versions_of |= versions
        lines += [f"\n### {title[0].upper()}{title[1:]}\n", table(HEADER, rows)]
        tqdm.write("\n".join(lines[-2:]))
    named = [
        f"{peer}: " + " ".join(f"{k} {v}" for k, v in versions_of[peer].items())
        for peer in versions_of
    ]
    report = "\n".join([lines[0], *named, *lines[1:], "", NOTES])
    print("\n".join([lines[0], *named, "", NOTES]))
    write_markdown(args.markdown, report)


if __name__ == "__main__":
    main()
