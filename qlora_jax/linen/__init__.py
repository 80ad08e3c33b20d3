"""QLoRA for flax.linen models, which need no changes.

`init` packs and adapts a model's parameters; `wrap` returns the model with an `apply`
that takes `{"params": base, "lora": lora}`.
"""

from ..adapters import serialization as serialization
from .dense import QLoRADense
from .init import init
from .rules import register
from .tiles import tiled
from .wrap import WrappedModel, wrap

__all__ = ["QLoRADense", "WrappedModel", "init", "register", "tiled", "wrap"]
