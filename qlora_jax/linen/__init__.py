"""QLoRA for flax.linen models, which need no changes."""

from .._jax.pytree import register_states
from .calls import register
from .init_model import init
from .tiled_module import tiled
from .wrapped import WrappedModel, wrap

register_states()

__all__ = ["WrappedModel", "init", "register", "tiled", "wrap"]
