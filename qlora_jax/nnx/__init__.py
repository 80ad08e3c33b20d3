"""QLoRA for Flax NNX: `wrap` packs a model's kernels; adapters are `nnx.LoRAParam`."""

from ..adapters import serialization as serialization
from .linear import QLoRALinear
from .place import place
from .rules import register
from .unwrap import join, merge, split
from .variables import Packed
from .wrap import wrap

__all__ = [
    "Packed",
    "QLoRALinear",
    "join",
    "merge",
    "place",
    "register",
    "split",
    "wrap",
]
