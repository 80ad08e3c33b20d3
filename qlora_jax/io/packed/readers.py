"""4-bit weights of a checkpoint, in any format that is read as it is."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from ...quant.settings import Packing
from ...trees.paths import refuse_listed
from ..bitsandbytes.packed import bitsandbytes_tensors
from ..files import CheckpointError
from .awq_gptq import AWQ_GPTQ
from .compressed_tensors import COMPRESSED_TENSORS
from .folder_settings import read_quantization
from .gguf_blocks import MXFP4, Q4_0
from .gpt_oss import GPT_OSS
from .mlx_weights import MLX
from .modelopt import MODELOPT
from .weight import Maker

_MAKERS = (COMPRESSED_TENSORS, AWQ_GPTQ, MODELOPT, GPT_OSS, MLX, Q4_0, MXFP4)


def packing_of(tensor: Any) -> Packing | None:
    """Returns how a tensor is packed in its file; None for numbers."""
    return getattr(tensor, "packing", None)


def packed_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's tensors; a 4-bit weight is one, and has a `packing`.

    Weights are those of bitsandbytes, compressed-tensors, AWQ, GPTQ, ModelOpt (NVFP4),
    gpt-oss (MXFP4, each expert a tensor `NAME.0`, `NAME.1` ...) and MLX.

    Args:
        tensors: From `open_safetensors`. What a folder's config says of its weights
            counts too.

    Raises:
        CheckpointError: If a part of a weight is missing or does not fit (all such
            weights are listed), or if the config says that weights are packed
            otherwise.

    Example:
        >>> import numpy as np, qlora_jax as ql
        >>> blocks = np.zeros((1, 2, 1, 16), np.uint8)
        >>> scales = np.full((1, 2, 1), 127, np.uint8)
        >>> tensors = {"up_blocks": blocks, "up_scales": scales}
        >>> found = ql.io.packed_tensors(tensors)
        >>> found["up.0"].shape, found["up.0"].packing.fmt
        ((2, 32), 'mxfp4')
    """
    folder = getattr(tensors, "folder", None)
    settings = {} if folder is None else read_quantization(folder)
    found, problems = bitsandbytes_tensors(tensors), []
    left: list[str] = []
    eight = [name for name in found if name.endswith(".SCB")]
    problems += [
        f"{name}: 8-bit weights of bitsandbytes are not read" for name in eight
    ]
    for maker in _MAKERS:
        for name in [n for n, x in found.items() if _is_part(maker, n, x)]:
            try:
                left += _group(found, maker, name, settings)
            except ValueError as error:
                stem = name.rpartition(maker.separator)[0]
                problems.append(f"{stem}: {error}")
    if left:
        warnings.warn(
            f"activations and caches stay in float: {left[0]} and {len(left) - 1} "
            "others of them are left out.",
            stacklevel=2,
        )
    title = "these are not 4-bit weights that can be read as they are"
    refuse_listed(title, problems, CheckpointError)
    return found


def _is_part(maker: Maker, name: str, tensor: Any) -> bool:
    is_named = name.rpartition(maker.separator)[-1] == maker.part
    is_own = not maker.dtype or str(tensor.dtype) == maker.dtype
    return is_named and is_own and packing_of(tensor) is None


def _group(
    found: dict[str, Any], maker: Maker, name: str, settings: Mapping[str, Any]
) -> list[str]:
    """Replaces the parts of a weight by the weight; returns those that are left out."""
    stem = name.removesuffix(maker.part)
    known = [part for part in (maker.part, *maker.others) if stem + part in found]
    parts = {part: found[stem + part] for part in known}
    made = maker.read(parts, settings)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in parts.values())
    for part in parts:
        del found[stem + part]
    for end, weight in made.items():
        name = stem.removesuffix("_") + end
        more = dict(name=name, nbytes=size // len(made))
        found[name] = dataclasses.replace(weight, **more)
    left = [stem + part for part in maker.left_out if stem + part in found]
    for name in left:
        del found[name]
    return left
