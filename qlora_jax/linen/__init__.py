"""The door to flax.linen: any model, unchanged.

`init` learns from one abstract trace which axes each kernel contracts; `wrap` gives a
model whose `apply` takes `{"params": base, "lora": lora}`.
"""

from . import serialization as serialization
from .dense import QLoRADense
from .init import init
from .rules import register
from .wrap import WrappedModel, wrap

__all__ = ["QLoRADense", "WrappedModel", "init", "register", "wrap"]
