"""The rows of `tpu_peers.py`, and the table of their results.

All rows have adapters of rank 64 on the seven linear modules of each layer, AdamW, one
sequence on one chip, and recompute each layer in the backward pass.
"""

from typing import Any

import aot_scale
import scale_rows
from scale_models import chip_of
from scale_rows import LORA, NAMES, PLAIN, SPLASH, STREAM, TILES, TOPOLOGIES
from scale_tables import SHORT, markdown, memory_cells, words

RANK = 64
TUNIX = {"rank": RANK, "module_path": ".*(attn|mlp)/.*_proj"}
NF4: dict[str, Any] = {"weight_qtype": "nf4", "tile_size": 64}
FLOAT: dict[str, Any] = {"weight_qtype": None, "tile_size": None}
MAXTEXT: dict[str, Any] = {
    "model_name": "llama3.1-8b",
    "per_device_batch_size": 1,
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "remat_policy": "full",
}
MAXTEXT_LORA = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": RANK}
MAXTEXT_NF4 = MAXTEXT_LORA | {"lora_weight_qtype": "nf4", "lora_tile_size": 64}
KERAS_MODULES = ["query", "key", "value", "attention_output"]
KERAS_MODULES += [f"feedforward_{x}_dense" for x in ("intermediate", "gate", "output")]
KERAS = {"rank": RANK, "target_layer_names": KERAS_MODULES}


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
    row("tunix", "8B", "v5e", 4096, TUNIX | NF4),
    row("maxtext", "8B", "v5e", 4096, MAXTEXT | {"lora": MAXTEXT_NF4}),
    row("keras-hub", "8B", "v5e", 4096, KERAS | {"quantize": "int4"}),
    row("tunix", "8B", "v6e", 4096, TUNIX | FLOAT),
    row("maxtext", "8B", "v6e", 4096, MAXTEXT | {"lora": MAXTEXT_LORA}),
    row("keras-hub", "8B", "v6e", 4096, KERAS | {"quantize": None}),
    row("tunix", "8B", "v6e", 4096, TUNIX | NF4),
    row("maxtext", "8B", "v6e", 4096, MAXTEXT | {"lora": MAXTEXT_NF4}),
]
# The rows of this library, which `aot_scale.py` compiles.
OURS = [
    scale_rows.row("8B", "v5e", 4096, PLAIN),
    scale_rows.row("8B", "v5e", 8192, PLAIN),
    scale_rows.row("8B", "v5e", 8192, SPLASH),
    scale_rows.row("8B", "v5e", 8192, STREAM),
    scale_rows.row("8B", "v5e", 512, LORA | TILES),
    scale_rows.row("8B", "v6e", 8192, LORA | TILES),
]


def our_records() -> list[dict]:
    """Returns the results of `aot_scale.py` for the rows of this library."""
    by_key = {aot_scale.key_of(x): x for x in aot_scale.read_results()}
    return [by_key[aot_scale.key_of(x)] for x in OURS]


def base_of(settings: dict) -> str:
    """Returns the format of a row's frozen linear layers."""
    peer, lora = settings.get("peer"), settings.get("lora", {})
    fmt = {
        "tunix": settings.get("weight_qtype"),
        "maxtext": lora.get("lora_weight_qtype"),
        "keras-hub": settings.get("quantize"),
    }
    base = fmt[peer] if peer else settings.get("fmt", "nf4")
    return base if base not in (None, "none") else "bf16 (LoRA)"


def table(records: list[dict]) -> str:
    """Returns the table of docs/benchmarks.md."""
    heads = ["model", "chip", "base", "library", "turned on", "tokens", "HBM", "fits"]
    heads += ["host"]
    rows = []
    for record in [*our_records(), *records]:
        settings = record["settings"]
        peer = settings.get("peer")
        rows.append(
            [
                SHORT[record["model"]],
                chip_of(record),
                base_of(settings),
                peer or "qlora_jax",
                "" if peer else words(settings),
                f"{settings['max_length']:,}",
                *memory_cells(record),
            ]
        )
    return markdown(heads, sorted(rows, key=lambda cells: cells[:3]))
