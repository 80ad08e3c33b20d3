"""Model families of the decoder; similar families share a file."""

import warnings
from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from . import gemma, llama, mixtures

FAMILIES = {
    family.model_type: family
    for module in (llama, gemma, mixtures)
    for family in module.FAMILIES
}


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder's config in a `config.json`.

    Warns about keys that are not read, unless they are known not to change the logits.

    Args:
        raw: The values in the file.

    Raises:
        ValueError: If `Decoder` does not support the family, or one of its options.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32,
        ...     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        >>> config_from_hf(raw).num_kv_heads
        4
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        names = tuple(FAMILIES)
        raise ValueError(f"`model_type` must be one of {names}. Got {model_type!r}.")
    family = FAMILIES[model_type]
    try:
        if architectures and not set(architectures) & set(family.architectures):
            raise ValueError(
                f"`architectures` must be {[*family.architectures]}. Got "
                f"{architectures}."
            )
        config = family.read_config(raw)
        keys = {**raw, **(raw.get("text_config") or {})}
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"config.json must hold values of the expected types. Got {error!r}."
        ) from error
    if unknown := family.unknown_keys(keys):
        warnings.warn(
            f"These keys of config.json are unknown, and are ignored: {unknown}. If "
            "they change what the model computes, the results are wrong.",
            stacklevel=2,
        )
    return config
