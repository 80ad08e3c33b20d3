"""Reads the rotary positions of a `config.json`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import Rope
from .family import number

_POSITIVE = ("factor", "original", "longest", "low_freq_factor", "high_freq_factor")
_POSITIVE += ("beta_fast", "beta_slow", "attention_factor")


def read_rope(
    raw: Mapping[str, Any],
    dim: int,
    *,
    theta: float = 10_000.0,
    section: Mapping[str, Any] | None = None,
) -> Rope:
    """Reads `rope_parameters`, or `rope_scaling` in older files.

    `dim` values of a head turn. `theta` is the family's default for `rope_theta`.
    `section` replaces both keys.
    """
    given = rope_section(raw) if section is None else section
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise ValueError(f"`partial_rotary_factor` must be 1. Got {share}.")
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind not in _KINDS:
        raise ValueError(f"`rope_type` must be one of {tuple(_KINDS)}. Got {kind!r}.")
    needed, divide = _KINDS[kind]
    if missing := [key for key in needed if given.get(key) is None]:
        raise ValueError(f'`rope_type` "{kind}" must come with {missing}. Got {given}.')
    theta = number(given.get("rope_theta") or raw.get("rope_theta") or theta)
    longest = raw.get("max_position_embeddings")
    key = "original_max_position_embeddings"
    original = raw.get(key) or given.get(key) or longest
    values = {**given, "original": original, "longest": longest}
    # Without a factor it is the ratio of the two lengths.
    has_factor = any(given.get(key) for key in ("factor", "attention_factor"))
    if kind not in ("default", "linear") and not (original and (has_factor or longest)):
        raise ValueError(
            f'`rope_type` "{kind}" must come with `max_position_embeddings`, or with '
            f"`original_max_position_embeddings` and `factor`. Got {given}."
        )
    wrong = [key for key in _POSITIVE if values.get(key) and number(values[key]) < 0]
    if wrong or not theta > 0:
        raise ValueError(f"{wrong or 'rope_theta'} must be positive. Got {given}.")
    with np.errstate(all="ignore"):  # `DecoderConfig` refuses what is not finite
        frequency = theta ** (-np.arange(0, dim, 2) / dim)
        return Rope(theta, **divide(values, frequency, theta))


def rope_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the section of a config about rotary positions."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"`rope_parameters` must be the same for all layers. Got those of {nested}."
        )
    return given


def _linear(values, frequency, theta) -> dict[str, Any]:
    """Divides positions by a factor."""
    return {"divisors": (number(values["factor"]),) * len(frequency)}


def _llama3(values, frequency, theta) -> dict[str, Any]:
    """Llama 3.1: divides slow frequencies by `factor`, and keeps fast ones."""
    # By the turns of a pair within the original context: fewer than `low` are divided,
    # more than `high` are kept, and frequencies between are interpolated.
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    turns = values["original"] * frequency / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return {"divisors": _floats((1 / (keep + (1 - keep) / values["factor"])).tolist())}


def _yarn(values, frequency, theta) -> dict[str, Any]:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp between pairs, and a scale."""
    half, original = len(frequency), values["original"]
    factor = values.get("factor") or values["longest"] / original

    # Pairs that turn more than `beta_fast` times in the original context keep their
    # frequency; those that turn less than `beta_slow` times are divided by the factor.
    def pair_that_turns(times: float) -> float:
        return half * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low = pair_that_turns(values.get("beta_fast") or 32)
    high = pair_that_turns(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    width = (high - low) or 0.001
    stretched = np.clip((np.arange(half) - low) / width, 0, 1)
    scale = values.get("attention_factor")
    if scale is None:  # the temperature of the paper, as a factor of q and k
        grown = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
        up, down = values.get("mscale"), values.get("mscale_all_dim")
        scale = grown(up) / grown(down) if up and down else grown(1)
    divisors = _floats((1 / (stretched / factor + (1 - stretched))).tolist())
    return {
        "divisors": divisors,
        "original_length": int(original),
        "scale": number(scale),
    }


def _longrope(values, frequency, theta) -> dict[str, Any]:
    """LongRoPE (arXiv:2402.13753): divisors by pair, others for long sequences."""
    half, original = len(frequency), values["original"]
    for key in ("short_factor", "long_factor"):
        if (count := len(values[key])) != half:
            raise ValueError(f"`{key}` must have {half} values. Got {count}.")
    scale = values.get("attention_factor")
    if scale is None:
        factor = values.get("factor") or values["longest"] / original
        log = math.log(factor) / math.log(original)
        scale = math.sqrt(1 + log) if factor > 1 else 1.0
    return {
        "divisors": _floats(values["short_factor"]),
        "long_divisors": _floats(values["long_factor"]),
        "original_length": int(original),
        "scale": number(scale),
    }


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(number(v) for v in values)


_KINDS = {
    "default": ((), lambda values, frequency, theta: {}),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": ((), _yarn),
    "longrope": (("short_factor", "long_factor"), _longrope),
}
