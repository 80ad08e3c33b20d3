"""Flax's state dicts (`flax.serialization.to_bytes`) of kernels and adapters.

Only the Flax integrations import this: it loads Flax.
"""

from flax import serialization

from .._jax.serialization import register_state
from ..quant.host_codes import HostCodes
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough
from .base import KINDS, AdaptedKernel

for _node_type in (QTensor, HostCodes, StraightThrough, AdaptedKernel, *KINDS.values()):
    register_state(serialization, _node_type)
