"""QLoRA for flax.linen models, which need no changes.

`init` packs and adapts parameters; `wrap` gives a model that takes the two trees.
"""

from .._jax.serialization import register_states
from .calls import register
from .dense import QLoRADense
from .init_model import init
from .tiled_module import tiled
from .wrapped import WrappedModel, wrap

register_states()

__all__ = ["QLoRADense", "WrappedModel", "init", "register", "tiled", "wrap"]
