"""Flax NNX: wrap any model by module surgery; adapters are `nnx.LoRAParam`."""

from .linear import QLoRALinear
from .registry import register
from .surgery import wrap
from .unwrap import merge, partition
from .variables import Packed

__all__ = ["Packed", "QLoRALinear", "merge", "partition", "register", "wrap"]
