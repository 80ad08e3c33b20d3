"""The rows of `tpu_peers.py`, and the table of their results.

All rows have adapters of rank 64 on the seven linear modules of each layer, AdamW, one
sequence on one chip, and recompute each layer in the backward pass.
"""

from typing import Any

import aot_scale
import scale_rows
from scale_rows import NAMES, PLAIN, SPLASH, STREAM, TOPOLOGIES
from scale_tables import markdown, memory_cells, words

RANK = 64
TUNIX: dict[str, Any] = {
    "rank": RANK,
    "module_path": ".*(attn|mlp)/.*_proj",
    "weight_qtype": "nf4",
    "tile_size": 64,
}
MAXTEXT: dict[str, Any] = {
    "model_name": "llama3.1-8b",
    "per_device_batch_size": 1,
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "remat_policy": "full",
    "lora": {
        "enable_lora": True,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "lora_weight_qtype": "nf4",
        "lora_tile_size": 64,
    },
}


def row(peer: str, model: str, chip: str, tokens: int, settings: dict) -> dict:
    """Returns a row; `settings` are those of the library."""
    return {
        "name": f"{peer}, {model} on {chip}, {tokens}, {settings}",
        "model": NAMES[model],
        "topology": f"{chip}:{TOPOLOGIES[1]}",
        "chips": 1,
        "settings": {"peer": peer, "max_length": tokens, **settings},
    }


ROWS = [
    row("tunix", "8B", "v5e", 4096, TUNIX),
    row("maxtext", "8B", "v5e", 4096, MAXTEXT),
]
# The rows of this library, which `aot_scale.py` compiles.
OURS = [
    scale_rows.row("8B", "v5e", 4096, PLAIN),
    scale_rows.row("8B", "v5e", 8192, SPLASH),
    scale_rows.row("8B", "v5e", 8192, STREAM),
]


def our_records() -> list[dict]:
    """Returns the results of `aot_scale.py` for the rows of this library."""
    by_key = {aot_scale.key_of(x): x for x in aot_scale.read_results()}
    return [by_key[aot_scale.key_of(x)] for x in OURS]


def table(records: list[dict]) -> str:
    """Returns the table of docs/benchmarks.md."""
    heads = ["library", "turned on", "tokens", "HBM", "fits"]
    rows = []
    for record in [*our_records(), *records]:
        settings = record["settings"]
        peer = settings.get("peer")
        rows.append(
            [
                peer or "qlora_jax",
                "" if peer else words(settings),
                f"{settings['max_length']:,}",
                *memory_cells(record)[:2],
            ]
        )
    return markdown(heads, rows)
