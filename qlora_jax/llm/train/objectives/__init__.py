"""The training objectives. Each file has a family of objectives, and registers them."""

from . import distill, kto, preferences, sft
from .registry import OBJECTIVES, Objective, find_objective, register_objective

__all__ = [
    "OBJECTIVES",
    "Objective",
    "distill",
    "find_objective",
    "kto",
    "preferences",
    "register_objective",
    "sft",
]
