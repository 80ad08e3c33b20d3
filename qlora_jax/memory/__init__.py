"""Parts of a model that keep a training step's memory small.

For a model of your own in any library: attention that holds no scores, layer inputs in
host memory, a function of tokens that runs on some of them at a time, and packed
kernels moved from host memory. `qlora_jax.models.decoder.Decoder` takes each but the
last by an argument.
"""

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
