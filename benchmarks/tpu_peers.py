"""A LoRA or QLoRA training step in JAX libraries, by the same TPU compiler; no TPU.

    python benchmarks/tpu_peers.py
    python benchmarks/tpu_peers.py --table

Run it in an environment that has `jax[tpu]`, this library's extra `models`, and one or
more of google-tunix, maxtext (with the packages of the extra `outside-maxtext`) and
keras-hub. It compiles the rows of these, and those rows of this library that
`aot_scale.py` does not have. Each row of `tpu_peers_rows.ROWS` is lowered from shapes
by a function of `tpu_peers_steps.py`, and compiled in a separate process with a time
limit, as in `aot_scale.py`. With `--plan`, compilers are stopped once they have
assigned buffers, before they generate code. Results are added to `tpu_peers.jsonl`.
`--table` writes the table of docs/benchmarks.md.
"""

import argparse
import importlib.metadata
import json
import pathlib
import re

import aot_scale

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
RESULTS = pathlib.Path(__file__).with_name("tpu_peers.jsonl")
# The packages that a library's rows need, besides `jax` and `libtpu`.
PACKAGES = {
    "qlora_jax": ["flax", "optax"],
    "tunix": ["google-tunix", "qwix", "flax", "optax"],
    "maxtext": ["maxtext", "qwix", "flax", "optax"],
    "keras-hub": ["keras-hub", "keras"],
}


def peer_of(row: dict) -> str:
    """Returns the name of a row's library."""
    return row["settings"].get("peer", "qlora_jax")


def versions(peer: str) -> dict:
    """Returns the versions that a result depends on, of packages that are installed."""
    names = "jax", "libtpu", *PACKAGES[peer]
    installed = {x.metadata["Name"] for x in importlib.metadata.distributions()}
    return {x: importlib.metadata.version(x) for x in names if x in installed}


def compile_here(row: dict) -> dict:
    """Lowers and compiles a row in this process; returns its record."""
    import tpu_peers_steps

    return aot_scale.compile_here(row, tpu_peers_steps.STEPS[peer_of(row)])


def main():
    """Compiles the rows that have no result, or writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--plan", action="store_true", help="stop before code")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print("RESULT", json.dumps(compile_here(json.loads(args.one))))
    from tpu_peers_rows import ROWS, table

    if args.table:
        from scale_tables import fill

        filled = {"peers": table(aot_scale.read_results(RESULTS))}
        return PAGE.write_text(fill(PAGE.read_text("utf-8"), filled), "utf-8")
    for row in ROWS:
        installed = versions(peer_of(row))
        can_compile = {"libtpu", *PACKAGES[peer_of(row)]} <= {*installed}
        if can_compile and re.search(args.only, row["name"]):
            aot_scale.compile_missing(
                row, args, installed, RESULTS, __file__, args.plan
            )


if __name__ == "__main__":
    main()
