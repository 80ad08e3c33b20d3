"""Losses of language models: cross entropy, distillation, and preferences."""

from .chunks import soft_cap
from .cross_entropy import chunked_cross_entropy
from .divergence import chunked_kl_divergence
from .preferences import dpo, ipo, kto, orpo, simpo

__all__ = [
    "chunked_cross_entropy",
    "chunked_kl_divergence",
    "dpo",
    "ipo",
    "kto",
    "orpo",
    "simpo",
    "soft_cap",
]
