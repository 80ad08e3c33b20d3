"""Computes rotary positions from a section of `config.json`, `rope_parameters`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .config import Rope

_ORIGINAL = "original_max_position_embeddings"
_MAX_DIM = 1 << 16  # far above any published model; bounds the memory
_POSITIVE = ("rope_theta", "factor", _ORIGINAL, "low_freq_factor", "high_freq_factor")
_POSITIVE += ("beta_fast", "beta_slow", "attention_factor")


def read_rope(section: Mapping[str, Any], dim: int, context: int) -> Rope:
    """Returns the rotary positions that a section of a config object describes.

    `dim` is the number of values of a head that are rotated, and `context` the context
    length in tokens.
    """
    if dim > _MAX_DIM:
        raise ValueError(f"a head must have at most {_MAX_DIM} values. Got {dim}.")
    kind = section.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        raise ValueError(f"`rope_type` must be one of {[*_ROPE_TYPES]}. Got {kind!r}.")
    if nested := [key for key, x in section.items() if isinstance(x, Mapping)]:
        raise ValueError(
            "`rope_parameters` must be the same for all layers. Got a section for each "
            f"of {nested}."
        )
    if "rope_theta" not in section:
        raise ValueError(f"`rope_parameters` must have a `rope_theta`. Got {section}.")
    for key in _POSITIVE:
        if (x := section.get(key)) is not None and not (is_number(x) and x > 0):
            raise ValueError(f"`{key}` must be a positive number. Got {x!r}.")
    theta, compute_fields = float(section["rope_theta"]), _ROPE_TYPES[kind]
    # NumPy need not warn about numbers that are not finite, because `DecoderConfig`
    # rejects them.
    with np.errstate(all="ignore"):
        frequencies = theta ** (-np.arange(0, dim, 2) / dim)
        return Rope(theta, **compute_fields(section, frequencies, context))


def read_partial_rope(
    section: Mapping[str, Any], head_dim: int, context: int
) -> tuple[Rope, int]:
    """Returns the rotary positions of a part of each head, and the size of the part."""
    fraction = section.get(key := "partial_rotary_factor", 1.0)
    if not is_number(fraction) or not 2 <= head_dim * fraction <= head_dim:
        raise ValueError(
            f"`{key}` must rotate at least one pair of the {head_dim} values of a "
            f"head, and at most all. Got {fraction!r}."
        )
    dim = int(head_dim * fraction)
    return read_rope(section, dim, context), dim


def is_number(value: object) -> bool:
    """Whether a value is a number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _linear(section, frequencies, context) -> dict[str, Any]:
    return {"divisors": (float(section["factor"]),) * len(frequencies)}


def _llama3(section, frequencies, context) -> dict[str, Any]:
    """Llama 3.1: divides slow frequencies by `factor`, and keeps fast ones."""
    # `factor` divides the frequencies of pairs with fewer than `low` rotations in the
    # original context. Pairs with more than `high` rotations keep their frequencies,
    # and the frequencies of the pairs in between are interpolated.
    low, high = section["low_freq_factor"], section["high_freq_factor"]
    rotations = section[_ORIGINAL] * frequencies / (2 * np.pi)
    unchanged = np.clip((rotations - low) / (high - low), 0, 1)
    divisors = 1 / (unchanged + (1 - unchanged) / section["factor"])
    return {"divisors": tuple(divisors.tolist())}


def _yarn(section, frequencies, context) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071): divisors that grow with the pair index, and a scale."""
    half, original = len(frequencies), section[_ORIGINAL]
    factor = section["factor"]

    def find_pair(rotations: float) -> float:
        """Returns the pair that rotates this often within the original context."""
        position = original / (rotations * 2 * math.pi)
        return half * math.log(position) / math.log(section["rope_theta"])

    # 1. The ramp. Pairs that rotate more than `beta_fast` times keep their frequency.
    # The frequencies of pairs that rotate less than `beta_slow` times are divided by
    # the factor, and those of the pairs in between are interpolated.
    low = find_pair(section.get("beta_fast") or 32)
    high = find_pair(section.get("beta_slow") or 1)
    truncate = section.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"`truncate` must be true or false. Got {truncate!r}.")
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = (high - low) or 0.001
    stretched = np.clip((np.arange(half) - low) / width, 0, 1)
    divisors = 1 / (stretched / factor + (1 - stretched))

    # 2. The scale of q and k: sqrt(1 / t), where t is the temperature in the paper.
    def compute_scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    scale = section.get("attention_factor")
    if scale is None:
        scale = compute_scale(1)
        mscale, mscale_all = section.get("mscale"), section.get("mscale_all_dim")
        if mscale and mscale_all:
            scale = compute_scale(mscale) / compute_scale(mscale_all)
    return {
        "divisors": tuple(divisors.tolist()),
        "original_length": int(original),
        "scale": float(scale),
    }


def _longrope(section, frequencies, context) -> dict[str, Any]:
    """LongRoPE (arXiv:2402.13753): divisors for short and for long sequences."""
    half, original = len(frequencies), section[_ORIGINAL]

    def read_divisors(key: str) -> tuple[float, ...]:
        divisors = section[key]
        if not isinstance(divisors, list) or not all(map(is_number, divisors)):
            raise ValueError(f"`{key}` must be a list of numbers. Got {divisors!r}.")
        if len(divisors) != half:
            raise ValueError(f"`{key}` must have {half} values. Got {len(divisors)}.")
        return tuple(map(float, divisors))

    short_divisors, long_divisors = map(read_divisors, ("short_factor", "long_factor"))
    scale = section.get("attention_factor")
    if scale is None:
        factor = section.get("factor") or context / original
        log = math.log(factor) / math.log(original)
        scale = math.sqrt(1 + log) if factor > 1 else 1.0
    return {
        "divisors": short_divisors,
        "long_divisors": long_divisors,
        "original_length": int(original),
        "scale": float(scale),
    }


# For each `rope_type`, the function that computes fields of `Rope`.
_ROPE_TYPES: dict[str, Callable[..., dict[str, Any]]] = {
    "default": lambda section, frequencies, context: {},
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
