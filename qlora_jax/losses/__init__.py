"""Losses of language models: cross entropy with a frozen head, and preferences."""

from .cross_entropy import chunked_cross_entropy, soft_cap
from .preferences import dpo, ipo, kto, orpo, simpo

__all__ = ["chunked_cross_entropy", "dpo", "ipo", "kto", "orpo", "simpo", "soft_cap"]
