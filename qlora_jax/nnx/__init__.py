"""QLoRA for Flax NNX: `wrap` packs a model's kernels; adapters are `nnx.LoRAParam`."""

from .._jax.serialization import register_states
from .linear import QLoRALinear
from .place import place
from .rules import register
from .switch import disable_adapters
from .unwrap import join, merge, split
from .variables import Packed
from .wrap import wrap

register_states()

__all__ = [
    "Packed",
    "QLoRALinear",
    "disable_adapters",
    "join",
    "merge",
    "place",
    "register",
    "split",
    "wrap",
]
