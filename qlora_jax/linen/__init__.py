"""The door to flax.linen: any model, unchanged.

`init` learns from one abstract trace which axes each kernel contracts; `wrap` gives a
model whose `apply` takes `{"params": base, "lora": lora}`.
"""

from .dense import QLoRADense
from .equations import register
from .initialize import init
from .model import WrappedModel, wrap

__all__ = ["QLoRADense", "WrappedModel", "init", "register", "wrap"]
