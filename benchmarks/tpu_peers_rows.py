"""The rows of `tpu_peers.py`, and the table of their results."""

from scale_rows import NAMES, TOPOLOGIES


def row(peer: str, model: str, chip: str, tokens: int, **settings) -> dict:
    return {
        "name": f"{peer}, {model} on {chip}, {tokens}, {settings}",
        "model": NAMES[model],
        "topology": f"{chip}:{TOPOLOGIES[1]}",
        "chips": 1,
        "settings": {"peer": peer, "max_length": tokens, **settings},
    }


ROWS = [
    row("qlora_jax", "8B", "v5e", 2048, lora_r=64, batch_size=1),
]
