"""Optimizers whose state takes less device memory: in 8 bits, or on the host."""

from .adamw8bit import adamw8bit
from .offload import offload
from .skippable import skippable

__all__ = ["adamw8bit", "offload", "skippable"]
