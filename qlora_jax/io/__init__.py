"""Checkpoints and adapters in and out: Hugging Face, bitsandbytes, PEFT, our own.

Files are safetensors and JSON, read and written without torch. A `Names` table says how
the leaves of a model are called there.
"""

from .bitsandbytes import save_bitsandbytes
from .files import CheckpointError
from .hub import fetch
from .load import load
from .merged import save_merged
from .names import Entry, Names
from .native import Restored, restore, save
from .safetensors import open_safetensors, write_safetensors
from .tensors import LazyTensor, Tensors

__all__ = [
    "CheckpointError",
    "Entry",
    "LazyTensor",
    "Names",
    "Restored",
    "Tensors",
    "fetch",
    "load",
    "open_safetensors",
    "restore",
    "save",
    "save_bitsandbytes",
    "save_merged",
    "write_safetensors",
]
