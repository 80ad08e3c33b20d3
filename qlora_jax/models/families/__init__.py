"""Model families of the decoder, those alike in one file."""

import warnings
from collections.abc import Mapping
from typing import Any

from ..config import DecoderConfig
from . import gemma, gpt_oss, llama, phi3, qwen, smollm3

FAMILIES = {
    family.model_type: family
    for module in (llama, qwen, gemma, smollm3, phi3, gpt_oss)
    for family in module.FAMILIES
}


def config_from_hf(raw: Mapping[str, Any]) -> DecoderConfig:
    """Returns the decoder's config in a `config.json`.

    Warns of keys that are neither read nor known to leave the logits as they are.

    Args:
        raw: The values in the file.

    Raises:
        ValueError: If `Decoder` does not have the family, or an option of it.

    Example:
        >>> raw = dict(model_type="llama", vocab_size=64, hidden_size=32,
        ...     intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        >>> config_from_hf(raw).num_kv_heads
        4
    """
    name, given = raw.get("model_type"), raw.get("architectures")
    if not isinstance(name, str) or name not in FAMILIES:
        known = tuple(FAMILIES)
        raise ValueError(f"`model_type` must be one of {known}. Got {name!r}.")
    family = FAMILIES[name]
    try:
        if given and not set(given) & set(family.architectures):
            wanted = [*family.architectures]
            raise ValueError(f"`architectures` must be {wanted}. Got {given}.")
        config = family.read_config(raw)
        keys = {**raw, **(raw.get("text_config") or {})}
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"a config must hold values of the kinds that its keys have. Got {error!r}."
        ) from error
    if unknown := family.unknown_keys(keys):
        warnings.warn(
            f"These keys of config.json are not known, and are ignored: {unknown}. If "
            "they change what the model computes, the results are wrong.",
            stacklevel=2,
        )
    return config
