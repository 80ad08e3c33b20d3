"""QLoRA for Flax NNX: `wrap` packs a model's kernels; adapters are `nnx.LoRAParam`."""

from .._jax.pytree import register_states
from .rules import register
from .variables import Packed
from .wrap import wrap
from .wrapped_models import disable_adapters, join, merge, place, split

register_states()

__all__ = [
    "Packed",
    "disable_adapters",
    "join",
    "merge",
    "place",
    "register",
    "split",
    "wrap",
]
