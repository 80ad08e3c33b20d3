"""QLoRA for JAX and Flax: frozen kernels in 4 bits and trainable LoRA adapters.

`qlora_jax.linen` and `qlora_jax.nnx` integrate with Flax, and `qlora_jax.torch` with
PyTorch. They load on first use.
`qlora_jax.llm` fine-tunes and serves language models with these parts.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import losses, memory
from .adapters.apply import apply, lookup
from .adapters.base import AdaptedKernel
from .adapters.config import QLoRAConfig
from .adapters.dora import DoRA
from .adapters.lora import LoRA
from .adapters.merge_aware import MergeAware
from .adapters.product import ragged_dot
from .adapters.trained import Trained, TrainedRows
from .product.einsum import einsum
from .product.matmul import matmul
from .quant.kernel import is_packed
from .quant.pack import StraightThrough
from .quant.qtensor import QTensor
from .trees import sharding
from .trees.adapters import combine, lora_labels, lora_mask, split, value_and_grad
from .trees.bank import Bank, bank, select
from .trees.init import init
from .trees.merge import merge, merge_adapters
from .trees.quantize import dequantize, quantize
from .trees.summary import summary

if TYPE_CHECKING:
    from . import io, linen, nnx, optim

__version__ = "0.3.0"

__all__ = [
    "AdaptedKernel",
    "Bank",
    "DoRA",
    "LoRA",
    "MergeAware",
    "QLoRAConfig",
    "QTensor",
    "StraightThrough",
    "Trained",
    "TrainedRows",
    "apply",
    "bank",
    "combine",
    "dequantize",
    "einsum",
    "init",
    "io",
    "is_packed",
    "linen",
    "lookup",
    "lora_labels",
    "lora_mask",
    "losses",
    "matmul",
    "memory",
    "merge",
    "merge_adapters",
    "nnx",
    "optim",
    "quantize",
    "ragged_dot",
    "select",
    "sharding",
    "split",
    "summary",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # What these import, such as Flax and Optax, is loaded only where they are used.
    # `torch` is not in `__all__`: a star import would need PyTorch, and hide its name.
    if name in __all__ or name == "torch":
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
