"""Optimizer state in 8 bits or in host memory, and updates that can be skipped."""

from .adamw8bit import adamw8bit
from .offload import offload
from .skippable import skippable

__all__ = ["adamw8bit", "offload", "skippable"]
