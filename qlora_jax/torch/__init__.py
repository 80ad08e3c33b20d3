"""QLoRA for PyTorch modules, which run in JAX through torchax."""

from .arrays import params
from .attention import register_attention
from .init import init, names
from .layers import stack, unstack
from .wrap import WrappedModule, wrap

__all__ = [
    "WrappedModule",
    "init",
    "names",
    "params",
    "register_attention",
    "stack",
    "unstack",
    "wrap",
]
