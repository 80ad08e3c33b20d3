"""The 4-bit product against the dense one, and quantization, on this machine's CPU.

    python benchmarks/cpu.py [--torch-python PATH] [--markdown FILE]

Prints ratios of medians from one run, in which the contestants take turns. A ratio
above 1 means that this library is slower.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from cases import inputs, weights
from jax_peers import contestant, product_functions, temporaries
from timing import (
    find_python,
    interleave,
    machine,
    make_parser,
    mib,
    start_worker,
    table,
    timed,
    versions,
    write_markdown,
)
from tqdm import tqdm

# A sample of 512 rows is one call. Nine are too few to distinguish 1.02 from 1.06.
ROUNDS = 41
PRODUCT_HEADER = [
    "dtype",
    "work",
    "rows",
    "/ dense",
    "/ best dense",
    "ours min ms",
    "ours median ms",
    "dense min ms",
    "dense median ms",
    "best dense median ms",
    "temporaries MiB",
    "dense temporaries MiB",
]
QUANTIZE_HEADER = [
    "dtype",
    "size",
    "bitsandbytes / ours",
    "ours min ms",
    "ours median ms",
    "bitsandbytes min ms",
    "bitsandbytes median ms",
]
NOTES = """\
"/ dense" is against `jnp.dot(x, w)` as it is written. "/ best dense" is against the
same with `preferred_element_type=float32` and a cast, forward and backward: in bfloat16
some versions of JAX are several times faster so. nf4, block 64, double quantization.
Temporaries: `memory_analysis()` of the compiled function."""


def product_rows(sizes: dict, rounds: int, bar: tqdm) -> list[list[str]]:
    """Returns a row for each dtype, kind of work and number of rows of x."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        w = jnp.asarray(weights(sizes), dtype)
        peers = ("qlora_jax", "dense", "dense-best")
        stored = {peer: contestant(peer, w) for peer in peers}
        compiled = {
            peer: product_functions(product) for peer, (_, product) in stored.items()
        }
        for i, work in enumerate(("forward", "forward + input gradient")):
            for m in sizes["rows"]:
                x, g = (jnp.asarray(v, dtype) for v in inputs(sizes | {"rows": m}))
                runs = {}
                for peer in peers:
                    runs[peer] = (compiled[peer][i], (x, stored[peer][0], g)[: 2 + i])
                bar.set_description(f"{dtype} {work} {m}")
                rows.append([dtype, work, str(m), *product_row(runs, rounds)])
                bar.update()
    return rows


def product_row(runs: dict, rounds: int) -> list[str]:
    """Returns ratios, times and temporaries of the three products."""

    def sampler(function, args):
        return timed(lambda: jax.block_until_ready(function(*args)))

    times = interleave({peer: sampler(*run) for peer, run in runs.items()}, rounds)
    ours, dense, best = (times[peer] for peer in ("qlora_jax", "dense", "dense-best"))

    def format_ms(seconds):
        return f"{seconds * 1e3:.2f}"

    return [
        f"{ours.median / dense.median:.2f}",
        f"{ours.median / best.median:.2f}",
        format_ms(ours.fastest),
        format_ms(ours.median),
        format_ms(dense.fastest),
        format_ms(dense.median),
        format_ms(best.median),
        mib(temporaries(runs["qlora_jax"][0], *runs["qlora_jax"][1])),
        mib(temporaries(runs["dense"][0], *runs["dense"][1])),
    ]


def quantize_rows(
    size: int, python: str | None, rounds: int, bar: tqdm
) -> list[list[str]]:
    """Returns a row for each dtype; bitsandbytes runs in a separate process."""
    import qlora_jax as ql

    rows = []
    for dtype in ("float32", "bfloat16"):
        bar.set_description(f"{dtype} quantize {size}")
        case = {"kind": "quantize", "dtype": dtype, "rows": 1, "k": size, "n": size}
        w = jnp.asarray(weights(case), dtype)

        def quantize(w=w):
            return jax.block_until_ready(ql.quantize(w, "nf4"))

        samplers = {"ours": timed(quantize)}
        worker = start_worker(python, "bitsandbytes", case) if python else None
        if worker is not None and "error" not in worker.facts:
            samplers["bitsandbytes"] = worker.sample
        times = interleave(samplers, rounds)
        if worker is not None:
            worker.close()
        rows.append([dtype, f"{size} x {size}", *quantize_row(times)])
        bar.update()
    return rows


def quantize_row(times: dict) -> list[str]:
    """Returns the ratio and the times, dashes where bitsandbytes is missing."""
    ours, theirs = times["ours"], times.get("bitsandbytes")
    cells = [f"{ours.fastest * 1e3:.2f}", f"{ours.median * 1e3:.2f}"]
    if theirs is None:
        return ["-", *cells, "-", "-"]
    ratio = f"{theirs.median / ours.median:.1f}"
    return [
        ratio,
        *cells,
        f"{theirs.fastest * 1e3:.2f}",
        f"{theirs.median * 1e3:.2f}",
    ]


def main() -> None:
    """Runs everything and prints the report."""
    parser = make_parser(__doc__, ROUNDS)
    parser.add_argument("--torch-python", help="a Python with torch and bitsandbytes")
    args = parser.parse_args()
    sizes = {"k": 2048, "n": 8192, "rows": (1, 16, 512)}
    if args.quick:
        sizes = {"k": 256, "n": 512, "rows": (1, 16)}
    python = find_python(args.torch_python, "bitsandbytes")
    with tqdm(total=4 * len(sizes["rows"]) + 2, disable=None) as bar:
        products = product_rows(sizes, args.rounds, bar)
        quantized = quantize_rows(sizes["k"], python, args.rounds, bar)
    named = " ".join(f"{k} {v}" for k, v in versions().items())
    lines = [
        f"Machine: {machine()}; {args.rounds} rounds",
        f"Versions: {named}",
        f"\n### Product, {sizes['k']} x {sizes['n']}\n",
        table(PRODUCT_HEADER, products),
        "\n### Quantization, double quantization included\n",
        table(QUANTIZE_HEADER, quantized),
        "",
        NOTES,
    ]
    if python is None:
        lines.append(
            "bitsandbytes was left out: no Python here or named can import it."
        )
    report = "\n".join(lines)
    print(report)
    write_markdown(args.markdown, report)


if __name__ == "__main__":
    main()
