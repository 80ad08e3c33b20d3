"""Parts of a model that reduce the memory of a training step."""

from .by_tiles import tiled
from .host_memory import layer_input, offload_layer_inputs, to_device
from .splash import splash_attention

__all__ = [
    "layer_input",
    "offload_layer_inputs",
    "splash_attention",
    "tiled",
    "to_device",
]
