"""The rows of `tpu_peers.py`, and the table of their results.

All rows have adapters of rank 64, AdamW, one sequence on one chip, and recompute each
layer in the backward pass. The adapters of Llama are on the seven linear modules of
each layer, those of the mixture of experts on the four of attention.
"""

from typing import Any

import aot_scale
import scale_rows
from scale_models import chip_of
from scale_rows import LORA, MIXED, NAMES, PLAIN, SPLASH, STREAM, TILES, TOPOLOGIES
from scale_tables import markdown, memory_cells, words

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


def table(records: list[dict]) -> str:
    """Returns the table of docs/benchmarks.md."""
    heads = ["model", "base", "chip", "library", "turned on", "tokens", "HBM", "fits"]
    rows = []
    for record in sorted(all_records(records), key=order):
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
