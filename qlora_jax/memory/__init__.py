"""Parts of a model that keep a training step's memory small.

Four parts, for a model of your own in any library: attention that holds no scores,
layer inputs in host memory, and a function of tokens that runs on some of them at a
time. `qlora_jax.models.decoder.Decoder` takes each by an argument.
"""

from .attention import splash_attention
from .offload import layer_input, offload_layer_inputs
from .tiles import tiled

__all__ = ["layer_input", "offload_layer_inputs", "splash_attention", "tiled"]
