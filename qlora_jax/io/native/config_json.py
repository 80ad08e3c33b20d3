"""Converts a `QLoRAConfig` to JSON and back."""

import re
from dataclasses import fields
from typing import Any

import jax.numpy as jnp

from ...adapters.config import QLoRAConfig
from ...quant.settings import FLOAT_DTYPES

_PATTERNS = ("targets", "exclude")
_BY_PATTERN = ("rank_pattern", "alpha_pattern", "contract")
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}
_FLAGS["x"] = re.VERBOSE


def config_to_json(config: QLoRAConfig) -> dict[str, Any]:
    """Returns a config as plain data; patterns in their order, as text."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _PATTERNS:
            value = [_text(pattern) for pattern in value]
        elif field.name in _BY_PATTERN:
            plain = lambda x: [*x] if isinstance(x, tuple) else x
            value = [[_text(p), plain(x)] for p, x in value.items()]
        elif field.name == "lora_dtype":
            value = jnp.dtype(value).name
        found[field.name] = value
    return found


def config_from_json(found: dict[str, Any]) -> QLoRAConfig:
    """Inverts `config_to_json`."""
    settings = dict(found)
    for name in _BY_PATTERN:
        plain = lambda x: tuple(x) if isinstance(x, list) else x
        settings[name] = {pattern: plain(x) for pattern, x in settings[name]}
    if settings["lora_dtype"] not in FLOAT_DTYPES:  # NumPy reads some texts as code
        raise ValueError(f"`lora_dtype` must be one of {FLOAT_DTYPES}.")
    return QLoRAConfig(**settings)


def _text(pattern: Any) -> str:
    """Returns a pattern as text, with its flags in front."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
    return f"(?{flags}){pattern.pattern}" if flags else pattern.pattern
