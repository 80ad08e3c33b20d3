"""QLoRA for PyTorch modules, which run in JAX through torchax."""

from .arrays import params
from .attention import register_attention
from .cached_model import CachedModel
from .init import init, names
from .language_model import LanguageModel, open_language_model
from .layers import stack, unstack
from .packed_rows import packing_problem
from .wrap import WrappedModule, wrap

__all__ = [
    "CachedModel",
    "LanguageModel",
    "WrappedModule",
    "init",
    "names",
    "open_language_model",
    "packing_problem",
    "params",
    "register_attention",
    "stack",
    "unstack",
    "wrap",
]
