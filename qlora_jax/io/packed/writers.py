"""Writes packed bases as servers load them: AWQ and compressed-tensors."""

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ...quant.qtensor import QTensor
from ...trees.paths import Tree, fused_with, refuse_listed
from ..files import Path
from ..model_folder import SHARD_BYTES
from ..names import Names
from ..tensors import DeferredTensor
from .layout import Kernels, PackedLayout, write_packed

_INT4 = ("int4_f16", "q4_0")
_INT32 = np.dtype("<i4")
# AWQ: the output that each nibble of a word is of, from the lowest one on.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The format, the type of the values, the dtype of scales and what has one, by their
# names in compressed-tensors.
_INTEGERS = ("pack-quantized", "int", None, "group")
_COMPRESSED = {
    **dict.fromkeys(_INT4, _INTEGERS),
    "mxfp4": ("mxfp4-pack-quantized", "float", "torch.uint8", "group"),
    "nvfp4": ("nvfp4-pack-quantized", "float", "torch.float8_e4m3fn", "tensor_group"),
}


def save_packed(
    path: Path,
    base: Tree,
    names: Names,
    config: Path | Mapping[str, Any],
    layout: Literal["awq", "compressed-tensors"],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a 4-bit checkpoint that vLLM and transformers load.

    Codes and scales are those of the tree, to the bit; other kernels stay in float.

    Args:
        path: As in `save_bitsandbytes`, and so the following.
        base: The base tree. Packed kernels are `int4_f16` or `q4_0`; for
            compressed-tensors they may be `mxfp4` or `nvfp4`.
        names: Which leaf is which tensor.
        config: The float model's `config.json`, or its folder.
        layout: How kernels are stored.
        max_shard_bytes: Largest size of a file, unless one tensor is larger.
        progress: Whether to show a bar.

    Raises:
        ValueError: If the layout cannot hold a packed kernel (all are listed), if there
            are none or of several settings, or if the folder is not empty.

    Example:
        >>> import tempfile, jax.numpy as jnp, qlora_jax as ql
        >>> base = {"up": {"kernel": ql.quantize(jnp.ones((128, 8)), "int4_f16")}}
        >>> names = ql.io.Names({"up/kernel": "up.weight"})
        >>> path = tempfile.mkdtemp()
        >>> ql.io.save_packed(path, base, names, {"model_type": "mine"}, "awq")
        >>> list(ql.io.open_safetensors(path))
        ['up.qweight', 'up.qzeros', 'up.scales']
    """
    options: Any = dict(max_shard_bytes=max_shard_bytes, progress=progress)
    write_packed(path, base, names, config, _LAYOUTS[layout], **options)


def _awq_tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    blocks = k // q.block_size
    zeros = np.full((blocks, n // 2), 0x88, np.uint8).view(_INT32)

    def words() -> np.ndarray:
        packed = np.asarray(q.codes)
        codes = np.stack([packed >> 4, packed & 15], 1).reshape(k, n // 8, 8)
        codes = codes[..., _ORDER]
        pairs = np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)
        return pairs.view(_INT32)[..., 0]

    scales = DeferredTensor(np.dtype(np.float16), (blocks, n), q.scales.__array__)
    module = name.removesuffix("weight")
    return {
        f"{module}qweight": DeferredTensor(_INT32, (k, n // 8), words),
        f"{module}qzeros": zeros,
        f"{module}scales": scales,
    }


def _awq_config(kernels: Kernels, in_float: list[str], own: Mapping) -> dict[str, Any]:
    size = next(iter(kernels.values())).block_size
    settings: Any = dict(quant_method="awq", version="gemm", bits=4, group_size=size)
    settings |= dict(zero_point=True, modules_to_not_convert=in_float)
    return {"quantization_config": settings, **_dtype(kernels, own)}


def _awq_refusal(q: QTensor) -> str | None:
    n = q.matrix_shape[-1]
    return f"its outputs must be a multiple of 8. Got {n}" if n % 8 else None


def _compressed_tensors(name: str, q: QTensor) -> dict[str, Any]:
    k, n = q.matrix_shape
    is_int = q.fmt in _INT4
    word = _INT32 if is_int else np.dtype(np.uint8)
    of_scale = _scale_dtype(q) if is_int else np.dtype(q.scales.dtype)

    def words() -> np.ndarray:
        packed = np.asarray(q.codes).T
        return np.ascontiguousarray(packed >> 4 | packed << 4).view(word)

    scales = lambda: np.asarray(q.scales).T.astype(of_scale)
    blocks = k // q.block_size
    tensors: dict[str, Any] = {
        f"{name}_packed": DeferredTensor(word, (n, k // 2 // word.itemsize), words),
        f"{name}_scale": DeferredTensor(of_scale, (n, blocks), scales),
    }
    if is_int:
        tensors[f"{name}_shape"] = np.array([n, k])
    if q.fmt == "nvfp4":
        factor, divisor = np.asarray(q.scale_scales)
        tensors[f"{name}_global_scale"] = (divisor / factor)[None]
    return tensors


def _compressed_config(
    kernels: Kernels, in_float: list[str], own: Mapping
) -> dict[str, Any]:
    q = next(iter(kernels.values()))
    if q.fmt == "nvfp4":
        _check_fused(kernels)
    form, kind, of_scale, strategy = _COMPRESSED[q.fmt]
    weights: Any = dict(num_bits=4, type=kind, symmetric=True, strategy=strategy)
    weights |= dict(group_size=q.block_size, dynamic=False, scale_dtype=of_scale)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    settings: Any = dict(quant_method="compressed-tensors", format=form)
    settings |= dict(quantization_status="compressed", ignore=in_float)
    settings["config_groups"] = {"group_0": group}
    return {"quantization_config": settings, **_dtype(kernels, own)}


def _check_fused(kernels: Kernels) -> None:
    """Refuses weights that servers multiply by the float32 of another one."""
    factors = {name: tuple(np.asarray(q.scale_scales)) for name, q in kernels.items()}
    pairs = [(one, two) for one in factors for two in fused_with(one) if two in factors]
    refuse_listed(
        "vLLM has one float32 for both of these weights, but theirs differ: pack them "
        "as one tree",
        [f"{one}, {two}" for one, two in pairs if factors[one] != factors[two]],
    )


def _scale_dtype(q: QTensor) -> np.dtype:
    """The dtype of int4 scales: that of the weights, if it holds them."""
    scales = np.asarray(q.scales)
    is_same = scales.astype(ml_dtypes.bfloat16).astype(scales.dtype) == scales
    is_held = q.dtype_name == "bfloat16" and is_same.all()
    return np.dtype(ml_dtypes.bfloat16 if is_held else scales.dtype)


def _dtype(kernels: Kernels, own: Mapping) -> dict[str, Any]:
    """The dtype of the model, in which servers multiply and to which they cast scales.

    vLLM has no MXFP4 in float16, transformers E2M1 in bfloat16 alone. Gemma overflows
    in float16.
    """
    is_int = next(iter(kernels.values())).fmt in _INT4
    if is_int and str(own.get("model_type")).startswith("gemma"):
        return {}
    names = {_scale_dtype(q).name if is_int else "bfloat16" for q in kernels.values()}
    return {"dtype": max(names), "torch_dtype": None}


_LAYOUTS = {
    "awq": PackedLayout("AWQ", _INT4, _awq_tensors, _awq_config, _awq_refusal),
    "compressed-tensors": PackedLayout(
        "compressed-tensors",
        tuple(_COMPRESSED),
        _compressed_tensors,
        _compressed_config,
        lambda q: None,
    ),
}
