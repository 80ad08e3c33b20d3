"""Checkpoints and adapters in and out: Hugging Face, bitsandbytes, PEFT, our own.

Files are safetensors and JSON, read and written without torch. A `Names` table says how
the leaves of a model are called there.
"""

from .names import Entry, Names

__all__ = ["Entry", "Names"]
