"""Parts of a model that keep a training step's memory small."""

from .by_tiles import tiled
from .layer_inputs import layer_input, offload_layer_inputs
from .splash import splash_attention
from .streamed import to_device

__all__ = [
    "layer_input",
    "offload_layer_inputs",
    "splash_attention",
    "tiled",
    "to_device",
]
