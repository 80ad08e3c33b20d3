"""Checks whether a language model keeps the sequences of a packed row apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from .attention import ATTENTION_NAME
from .cached_model import CachedModel
from .language_model import LanguageModel

LENGTHS = (4, 3)  # of the sequences in the row for which masks are checked


def packing_problem(language_model: LanguageModel) -> str | None:
    """Returns why a row cannot contain several sequences; None if it can.

    In a packed row, `position_ids` start again at 0 with each sequence. A model can
    have packed rows only if everything that it computes respects these positions: each
    layer must compute attention as `register_attention` describes, with masks that
    separate sequences, and nothing else may mix tokens. The positions must be rotary,
    so that attention depends only on the distances between tokens.

    Args:
        language_model: The model.

    Example:
        >>> import qlora_jax as ql, tempfile, transformers
        >>> config = transformers.GPTNeoXConfig(
        ...     vocab_size=128, hidden_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4)
        >>> folder = tempfile.mkdtemp()
        >>> config.save_pretrained(folder)
        >>> ql.torch.packing_problem(ql.torch.open_language_model(folder)) is None
        True
    """
    module: Any = language_model.module
    if getattr(module.config, "_attn_implementation", None) != ATTENTION_NAME:
        return "it computes attention in its own code"
    try:
        has_states = CachedModel(language_model).has_states
    except ValueError:  # transformers has no static cache for this kind of layers
        return "its layers may have states"
    has_convolutions = any(
        isinstance(inner, torch.nn.modules.conv._ConvNd) for inner in module.modules()
    )
    if has_states or has_convolutions:
        return "its layers have states or convolutions, which span all sequences"
    has_rotary = any("Rotary" in type(inner).__name__ for inner in module.modules())
    if not has_rotary or language_model.max_positions is not None:
        return "its positions are not rotary"
    return _mask_problem(language_model)


def _mask_problem(language_model: LanguageModel) -> str | None:
    """Compares the masks of a packed row with those of each sequence in its own row."""
    module: Any = language_model.module
    positions = [np.arange(length) for length in LENGTHS]
    try:
        packed = _masks_of(language_model, np.concatenate(positions))
        separate = [_masks_of(language_model, x) for x in positions]
    except (NotImplementedError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    num_layers = module.config.get_text_config().num_hidden_layers
    if any(len(masks) != num_layers for masks in (packed, *separate)):
        return (
            f"only {len(packed)} of its {num_layers} layers have the attention in JAX"
        )
    start = 0
    for length, masks in zip(LENGTHS, separate, strict=True):
        stop = start + length
        for packed_mask, mask in zip(packed, masks, strict=True):
            rows = packed_mask[..., start:stop, :]
            expected = np.zeros(rows.shape, bool)
            expected[..., start:stop] = mask
            if not np.array_equal(rows, expected):
                return "its attention masks do not keep the sequences of a row apart"
        start = stop
    return None


def _masks_of(language_model: LanguageModel, positions: np.ndarray) -> list[np.ndarray]:
    """Returns the attention mask of each layer for a row with these positions."""

    def compute_masks(positions: jax.Array) -> list[jax.Array]:
        masks: list[jax.Array] = []
        # The masks do not depend on weights, so XLA computes nothing but the masks.
        shapes = language_model.shapes(stacked=False).items()
        params = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes}
        ids = jnp.zeros(positions.shape, jnp.int32)
        # transformers passes unknown arguments such as `record_mask` to `attention`.
        language_model.hidden_states(
            {"params": params}, ids, position_ids=positions, record_mask=masks.append
        )
        return masks

    return [np.asarray(x) for x in jax.jit(compute_masks)(positions[None])]
