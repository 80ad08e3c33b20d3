"""Losses with a frozen head: of tokens, without all logits, and of preferences."""

from .cross_entropy import chunked_cross_entropy, soft_cap
from .preferences import dpo, ipo, kto, orpo, simpo

__all__ = ["chunked_cross_entropy", "dpo", "ipo", "kto", "orpo", "simpo", "soft_cap"]
