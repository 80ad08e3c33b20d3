"""Checkpoints and adapters in and out: Hugging Face, bitsandbytes, PEFT, our own.

Files are safetensors and JSON, read and written without torch. A `Names` table says how
the leaves of a model are called there.
"""

from .files import CheckpointError
from .load import load
from .names import Entry, Names
from .safetensors import open_safetensors, write_safetensors
from .tensors import LazyTensor, Tensors

__all__ = [
    "CheckpointError",
    "Entry",
    "LazyTensor",
    "Names",
    "Tensors",
    "load",
    "open_safetensors",
    "write_safetensors",
]
