"""Models and chips of `aot_scale.py`: shapes of each model's `config.json`."""

from dataclasses import dataclass
from typing import Any

from memory import MODELS as SMALLER

from qlora_jax.models.config import DecoderConfig, LayerKind, Rope


def _decoder(*sizes: int, heads: int, rope: Rope, **others: Any) -> DecoderConfig:
    """`sizes` are the vocabulary, the hidden size, the MLP's and the layers."""
    return DecoderConfig(
        *sizes,
        num_heads=heads,
        layers=(LayerKind(rope),),
        num_kv_heads=8,
        tie_embeddings=False,
        **others,
    )


_QWEN: dict[str, Any] = {"heads": 40, "rope": Rope(1e6), "qkv_bias": True}
MODELS = {
    "Llama-3.2-3B": SMALLER["Llama-3.2-3B"],
    "Llama-3.1-8B": SMALLER["Llama-3.1-8B"],
    "Qwen2.5-14B": _decoder(152064, 5120, 13824, 48, **_QWEN),
    "Qwen2.5-32B": _decoder(152064, 5120, 27648, 64, **_QWEN),
    "Llama-3.1-70B": SMALLER["Llama-3.1-70B"],
    "Llama-3.1-405B": _decoder(
        128256, 16384, 53248, 126, heads=128, rope=Rope(500_000.0)
    ),
}


@dataclass(frozen=True)
class Chip:
    """What a chip does in a second.

    Attributes:
        flops: Peak of bfloat16 products.
        hbm_rate: HBM's bandwidth.
        ici_rate: What a chip sends to its neighbours, all links together, one way.
        host_rate: What passes between the host and a chip, one way.
    """

    flops: float
    hbm_rate: float
    ici_rate: float
    host_rate: float


# Google Cloud's pages of the chips: 197 and 918 TFLOP/s, 819 and 1640 GB/s, 1600 and
# 3584 Gbit/s of interconnect. PCIe is not stated there: 14 GB/s is half of a fourth
# generation link of 16 lanes.
CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 14e9),
    "v6e": Chip(918e12, 1640e9, 448e9, 14e9),
}
# Bytes that a program may use: of TPUs as the compiler says, of an H100 what XLA's
# description of it has.
HBM = {"v5e": 15.75 * 2**30, "v6e": 31.24 * 2**30, "h100": 84_978_434_048}


def chip_of(record: dict) -> str:
    """Returns the name of a row's chips."""
    return record["topology"].partition(":")[0]
