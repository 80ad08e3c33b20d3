"""4-bit weights of a checkpoint, in any format that is read as it is."""

from collections.abc import Mapping
from typing import Any

from ..quant.settings import Packing
from .bitsandbytes.packed import bitsandbytes_tensors
from .compressed_tensors import compressed_tensors


def packing_of(tensor: Any) -> Packing | None:
    """Returns how a tensor is packed in its file; None for numbers."""
    return getattr(tensor, "packing", None)


def packed_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors; a 4-bit weight is one, and has a `packing`.

    Args:
        tensors: From `open_safetensors`.

    Raises:
        CheckpointError: If a part of a weight of bitsandbytes or compressed-tensors is
            missing or does not fit: all such weights are listed.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((64, 2)), "nf4")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_bitsandbytes(path, base, names, {"model_type": "mine"})
        >>> found = ql.io.packed_tensors(ql.io.open_safetensors(path))
        >>> found["up.weight"].shape, found["up.weight"].packing.block_size
        ((2, 64), 64)
    """
    return compressed_tensors(bitsandbytes_tensors(tensors))
