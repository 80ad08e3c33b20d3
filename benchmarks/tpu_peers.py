"""A LoRA or QLoRA training step in JAX libraries, by the same TPU compiler; no TPU.

    python benchmarks/tpu_peers.py
    python benchmarks/tpu_peers.py --table

Run it in an environment that has `jax[tpu]`, this library's extra `models`, and one or
more of google-tunix, maxtext (with the packages of the extra `outside-maxtext`) and
keras-hub. It compiles the rows of these, and those rows of this library that
`aot_scale.py` does not have. Each row of `ROWS` is lowered from shapes
by a function of `tpu_peers_steps.py`, and compiled in a separate process with a time
limit, as in `aot_scale.py`. With `--plan`, compilers are stopped once they have
assigned buffers, before they generate code. Results are added to `tpu_peers.jsonl`.

All rows have adapters of rank 64, AdamW, one sequence on one chip, and recompute each
layer in the backward pass. The adapters of Llama are on the seven linear modules of
each layer, those of the mixture of experts on the four of attention.
`--table` writes the table of docs/benchmarks.md.
"""

import argparse
import importlib.metadata
import json
import pathlib
import re
from typing import Any

import aot_scale
import scale_rows
from scale_rows import (
    LORA,
    MIXED,
    NAMES,
    PLAIN,
    SPLASH,
    STREAM,
    TILES,
    TOPOLOGIES,
    chip_of,
)
from scale_tables import best_by, fill, markdown, memory_cells, words

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "benchmarks.md"
RESULTS = pathlib.Path(__file__).with_name("tpu_peers.jsonl")
# The packages that a library's rows need, besides `jax` and `libtpu`.
PACKAGES = {
    "qlora_jax": ["flax", "optax"],
    "tunix": ["google-tunix", "qwix", "flax", "optax"],
    "maxtext": ["maxtext", "qwix", "flax", "optax"],
    "keras-hub": ["keras-hub", "keras"],
}
RANK = 64
TUNIX_LORA: dict[str, Any] = {"rank": RANK, "module_path": ".*(attn|mlp)/.*_proj"}
TUNIX = TUNIX_LORA | {"weight_qtype": "nf4", "tile_size": 64}
ADAPTERS = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": RANK}
MAXTEXT_LORA: dict[str, Any] = {
    "model_name": "llama3.1-8b",
    "per_device_batch_size": 1,
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "remat_policy": "full",
    "lora": ADAPTERS,
}
QLORA = {"lora_weight_qtype": "nf4", "lora_tile_size": 64}
MAXTEXT = MAXTEXT_LORA | {"lora": ADAPTERS | QLORA}
MAXTEXT_MIXED = MAXTEXT | {"model_name": "qwen3-30b-a3b"}
# All linear layers of a decoder layer. The default of `enable_lora` is query and value.
KERAS_LAYERS = [
    *("query", "key", "value", "attention_output"),
    *("feedforward_gate_dense", "feedforward_intermediate_dense"),
    "feedforward_output_dense",
]
KERAS_LORA: dict[str, Any] = {"rank": RANK, "target_layer_names": KERAS_LAYERS}
KERAS = KERAS_LORA | {"quantize": "int4"}


def row(peer: str, model: str, chip: str, tokens: int, settings: dict) -> dict:
    """Returns a row; `settings` are those of the library."""
    return {
        "name": f"{peer}, {model} on {chip}, {tokens}, {settings}",
        "model": NAMES[model],
        "topology": f"{chip}:{TOPOLOGIES[1]}",
        "chips": 1,
        "settings": {"peer": peer, "max_length": tokens, **settings},
    }


# The rows of this library, of which `aot_scale.py` compiles the first.
SCALE = [
    scale_rows.row("8B", "v5e", 4096, PLAIN),
    scale_rows.row("8B", "v5e", 8192, SPLASH),
    scale_rows.row("8B", "v5e", 8192, STREAM),
    scale_rows.row("8B", "v6e", 8192, LORA | TILES),
    scale_rows.row("30B-A3B", "v6e", 8192, MIXED),
    scale_rows.row("30B-A3B", "v6e", 512, LORA | MIXED),
]
OURS = [
    scale_rows.row("8B", "v6e", 4096, PLAIN),
    scale_rows.row("8B", "v6e", 32768, STREAM),
    scale_rows.row("8B", "v6e", 65536, STREAM),
    scale_rows.row("8B", "v6e", 4096, LORA | PLAIN),
    scale_rows.row("8B", "v6e", 16384, LORA | STREAM),
    scale_rows.row("8B", "v6e", 32768, LORA | STREAM),
    scale_rows.row("8B", "v5e", 16384, STREAM),
    scale_rows.row("8B", "v5e", 32768, STREAM),
]
ROWS = [
    *OURS,
    row("tunix", "8B", "v5e", 2048, TUNIX),
    row("tunix", "8B", "v5e", 4096, TUNIX),
    row("tunix", "8B", "v6e", 4096, TUNIX),
    row("tunix", "8B", "v6e", 8192, TUNIX),
    row("tunix", "8B", "v6e", 4096, TUNIX_LORA),
    row("maxtext", "8B", "v5e", 4096, MAXTEXT),
    row("maxtext", "8B", "v5e", 8192, MAXTEXT),
    row("maxtext", "8B", "v6e", 4096, MAXTEXT),
    row("maxtext", "8B", "v6e", 16384, MAXTEXT),
    row("maxtext", "8B", "v6e", 32768, MAXTEXT),
    row("maxtext", "8B", "v6e", 65536, MAXTEXT),
    row("maxtext", "8B", "v6e", 512, MAXTEXT_LORA),
    row("maxtext", "8B", "v6e", 4096, MAXTEXT_LORA),
    row("keras-hub", "8B", "v6e", 4096, KERAS),
    row("keras-hub", "8B", "v6e", 8192, KERAS),
    row("keras-hub", "8B", "v6e", 4096, KERAS_LORA),
    row("maxtext", "30B-A3B", "v6e", 4096, MAXTEXT_MIXED),
    row("tunix", "30B-A3B", "v6e", 4096, TUNIX_LORA),
]


def base_of(settings: dict) -> str:
    """Returns the format of the frozen weights that have adapters."""
    if "peer" not in settings:
        return settings.get("fmt", "nf4").replace("none", "bf16")
    qtype = settings.get("lora", {}).get("lora_weight_qtype")
    return qtype or settings.get("weight_qtype") or settings.get("quantize") or "bf16"


def order(record: dict) -> tuple:
    """Returns the key by which the records of a table are sorted."""
    settings = record["settings"]
    is_lora, peer = base_of(settings) == "bf16", settings.get("peer", "")
    chip, tokens = chip_of(record), settings["max_length"]
    model = list(NAMES.values()).index(record["model"])
    return model, is_lora, chip, peer, tokens


def all_records(records: list[dict]) -> list[dict]:
    """Returns `records`, and those of this library in the results of `aot_scale.py`."""
    by_key = {aot_scale.key_of(x): x for x in aot_scale.read_results()}
    return [*(by_key[aot_scale.key_of(x)] for x in SCALE), *records]


def peers_table(records: list[dict]) -> str:
    """Returns the table of docs/benchmarks.md, of the most tokens found to fit."""
    heads = ["model", "base", "chip", "library", "turned on", "tokens", "HBM", "fits"]
    rows = []
    # `order` without the tokens, its last value.
    best = best_by(lambda record: order(record)[:-1], all_records(records))
    for record in sorted(best, key=order):
        settings = record["settings"]
        peer = settings.get("peer")
        is_mixed = record["model"] == NAMES["30B-A3B"]
        rows.append(
            [
                record["model"],
                base_of(settings) + ", experts bf16" * (peer == "maxtext" and is_mixed),
                chip_of(record),
                peer or "qlora_jax",
                "" if peer else words(settings),
                f"{settings['max_length']:,}",
                *memory_cells(record)[:2],
            ]
        )
    return markdown(heads, rows)


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
    if args.table:
        filled = {"peers": peers_table(aot_scale.read_results(RESULTS))}
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
