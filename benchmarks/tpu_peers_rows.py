"""The rows of `tpu_peers.py`, and the table of their results."""

from typing import Any

from scale_rows import LORA, NAMES, TILES, TOPOLOGIES

RANK = 64
OURS = {"lora_r": RANK, "batch_size": 1}
ATTENTION_AND_MLP = r".*(attn|mlp)/.*_proj"
TUNIX = {"rank": RANK, "module_path": ATTENTION_AND_MLP, "remat": "DECODER"}
NF4 = {"weight_qtype": "nf4", "tile_size": 64}
INT4 = {"weight_qtype": "int4", "tile_size": 64}
FLOAT = {"weight_qtype": None, "tile_size": None}
MAXTEXT_LORA = {"enable_lora": True, "lora_rank": RANK, "lora_alpha": RANK}
MAXTEXT_NF4 = MAXTEXT_LORA | {"lora_weight_qtype": "nf4", "lora_tile_size": 64}
MAXTEXT: dict[str, Any] = {
    "model_name": "llama3.1-8b",
    "per_device_batch_size": 1,
    "dtype": "bfloat16",
    "weight_dtype": "bfloat16",
    "remat_policy": "full",
}


def row(
    peer: str, model: str, chip: str, tokens: int, settings: dict, chips: int = 1
) -> dict:
    """Returns a row; `settings` are those of the library."""
    return {
        "name": f"{peer}, {model} on {chip}, {tokens}, {settings}",
        "model": NAMES[model],
        "topology": f"{chip}:{TOPOLOGIES[chips]}",
        "chips": chips,
        "settings": {"peer": peer, "max_length": tokens, **settings},
    }


ROWS = [
    row("qlora_jax", "8B", "v5e", 2048, OURS),
    row("tunix", "8B", "v5e", 2048, TUNIX | NF4),
    row("maxtext", "8B", "v5e", 2048, MAXTEXT | {"lora": MAXTEXT_NF4}),
    row("tunix", "8B", "v6e", 2048, TUNIX | NF4),
    row("maxtext", "8B", "v6e", 2048, MAXTEXT | {"lora": MAXTEXT_NF4}),
    row("tunix", "8B", "v6e", 2048, TUNIX | FLOAT),
    row("maxtext", "8B", "v6e", 2048, MAXTEXT | {"lora": MAXTEXT_LORA}),
    row("qlora_jax", "8B", "v6e", 2048, OURS | LORA),
    row("qlora_jax", "8B", "v6e", 2048, OURS),
]
