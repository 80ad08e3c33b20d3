"""Flax's state dicts (`flax.serialization.to_bytes`) of kernels and adapters."""

from flax import serialization

from .._jax.serialization import register_state
from ..adapters.lora import AdaptedKernel, LoRA
from ..quant.host import HostCodes
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough

for _node_type in (QTensor, HostCodes, StraightThrough, LoRA, AdaptedKernel):
    register_state(serialization, _node_type)
