"""Optimizer state in host memory."""

from .offload import offload

__all__ = ["offload"]
