"""`quantize` and `dequantize`, on one array or on a tree."""

import functools
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp

from .._jax.memory import check_donated, delete
from .._jax.pytree import is_tree_leaf
from ..adapters.config import QLoRAConfig
from ..quant.geometry import Contract, Geometry, to_matrix
from ..quant.kernel import Kernel, as_kernel
from ..quant.pack import check_kernel, quantize_checked, quantize_kernel
from ..quant.qtensor import QTensor
from ..quant.settings import Packing
from ..quant.straight_through import StraightThrough
from .adapters import check_structure
from .paths import Tree, fused_with, leaves_by_path, map_by_path
from .targets import find_targets


def freeze(
    kernel: Kernel,
    packing: Packing | None,
    *,
    pack: bool,
    donate: bool = False,
    largest: jax.Array | None = None,
) -> Any:
    """Returns the base leaf for a float kernel: packed, trained or still float."""
    w, geometry = kernel.value, kernel.geometry
    if packing is None:
        return w
    if not pack:
        return StraightThrough(jnp.asarray(w), packing, geometry)
    more = () if largest is None else (largest,)
    q = quantize_checked(w, packing, geometry, *more)
    if donate:
        delete(w, q)
    return q


def largest_by_path(
    leaves: Mapping[str, Any],
    geometries: Mapping[str, Geometry],
    packing: Packing | None,
) -> dict[str, Any]:
    """Returns the largest weight of all that servers keep as one with each target.

    They have one float32 of NVFP4 for all. There is none for other formats, and for
    kernels whose own was trained with.
    """
    if packing is None or not packing.scheme.needs_largest:
        return {}
    kernels = {path: as_kernel(leaves[path], geometries[path]) for path in geometries}
    floats = {p: x for p, x in kernels.items() if not x.is_packed | x.is_trained}
    each = {path: _largest(x.value, x.geometry) for path, x in floats.items()}
    found = {}
    for path, own in each.items():
        fused = (each.get(other, own) for other in fused_with(path))
        same = (x for x in fused if x.shape == own.shape)
        found[path] = functools.reduce(jnp.maximum, same, own)
    return found


@functools.partial(jax.jit, static_argnums=1)
def _largest(w: Any, geometry: Geometry) -> jax.Array:
    matrix = to_matrix(geometry, w).astype(jnp.float32)
    return jnp.max(jnp.abs(matrix), axis=(-1, -2), initial=0)


def _quantize_tree(params: Tree, config: QLoRAConfig, donate: bool) -> Tree:
    leaves = leaves_by_path(params)
    geometries = find_targets(leaves, config, accept=lambda kernel: kernel.is_trained)
    is_trained = any(as_kernel(leaves[path]).is_trained for path in geometries)
    pack = config.freeze_base or is_trained
    if donate and pack and config.packing is not None:
        check_donated(leaves, geometries)

    largest = largest_by_path(leaves, geometries, config.packing)

    def one(path: str, w: Any) -> Any:
        if path not in geometries:
            return w
        kernel = as_kernel(w, geometries[path])
        more: Any = dict(pack=pack, donate=donate, largest=largest.get(path))
        return freeze(kernel, config.packing, **more)

    return map_by_path(one, params)


@overload
def quantize(
    params: Any,
    fmt: str = "nf4",
    *,
    block_size: int | None = None,
    double_quant: bool | None = None,
    contract: Contract = -2,
    donate: bool = False,
) -> QTensor: ...
@overload
def quantize(params: Tree, fmt: QLoRAConfig, *, donate: bool = False) -> Tree: ...
def quantize(
    params: Tree,
    fmt: str | QLoRAConfig = "nf4",
    *,
    block_size: int | None = None,
    double_quant: bool | None = None,
    contract: Contract = -2,
    donate: bool = False,
) -> Any:
    """Returns an array as a QTensor, or a tree with frozen kernels at the targets.

    Blockwise k-bit quantization with a table of values (QLoRA, Dettmers et al. 2023,
    section 3); codes and scales equal bitsandbytes' for "nf4" and "fp4",
    compressed-tensors' for "int4_f16" (also the form of AWQ and GPTQ), "mxfp4" and
    "nvfp4", and llama.cpp's for "q4_0". A block whose scale is below 1.18e-38, the
    smallest normal float32, decodes to 0 (bitsandbytes keeps it on CPUs). The scale is
    the largest weight in "nf4" and "fp4", a seventh of it in "int4" and 1/127 of it in
    "int8".

    Kernels that were trained through their quantization (`freeze_base=False`), alone or
    in a tree, are packed in the settings of their training; the config must have the
    same.

    Args:
        params: A float array `[..., K, N]` (or one with other contracted axes) in
            bfloat16, float16, float32 or float64; or a tree, with a config.
        fmt: The number format, one of "fp4", "int4", "int8", "nf4", "int4_f16",
            "q4_0", "mxfp4" and "nvfp4"; or a `QLoRAConfig` with all settings.
        block_size: Weights along K that share a scale: a power of two, 16 to 4096; 64
            by default. "int4_f16" has 128 (its default), 64 or 32, "q4_0" and "mxfp4"
            32, "nvfp4" 16, and K must be a multiple of it.
        double_quant: Whether the scales are quantized too, to 8 bits: by default, but
            in the last four, which store scales in 8 or 16 bits by themselves.
        contract: The contracted axes, negative, or the role of each trailing axis as
            letters ("kn", "nk", "bkn"), as in `QLoRAConfig.contract`.
        donate: Delete each float array once it is quantized, as in `init`.

    Raises:
        TypeError: If the array is not floating-point (float8 is not supported), or is
            a shape (call `quantize` under `jax.eval_shape` for those); if `fmt` is
            neither text nor a config; or if a tree comes without one.
        ValueError: If the array has fewer than two axes; if a setting is out of range,
            or is given together with a config; or, outside jit, if a weight is not
            finite, or so large that the sum of the scales overflows in double
            quantization. For a tree, as `init`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.quantize(jnp.ones((128, 8)), "int4", block_size=32).scales.shape
        (4, 8)
        >>> ql.quantize(jnp.ones((8, 128)), contract="nk").scales.shape  # [out, in]
        (2, 8)
    """
    if isinstance(fmt, QLoRAConfig):
        if (block_size, double_quant, contract) != (None, None, -2):
            raise ValueError(
                "`block_size`, `double_quant` and `contract` must not be given with "
                f"a config. Got {block_size}, {double_quant} and {contract}."
            )
        return _quantize_tree(params, fmt, donate)
    if not isinstance(fmt, str):
        raise TypeError(
            f"`fmt` must be a format's name or a QLoRAConfig. Got {type(fmt).__name__}."
        )
    if isinstance(params, Mapping):
        raise TypeError("a tree must be given with a QLoRAConfig. Got none.")
    if isinstance(params, StraightThrough):
        w, q = params.value, params.to_qtensor()
    else:
        check_kernel(params)
        packing = Packing(fmt, block_size, double_quant)
        geometry = Geometry.contracting(contract, params.shape)
        w, q = params, quantize_kernel(params, packing, geometry)
    if donate:
        delete(w, q)
    return q


@overload
def dequantize(tree: Kernel, dtype: Any = None) -> jax.Array: ...
@overload
def dequantize(tree: Tree, dtype: Any = None) -> Tree: ...
def dequantize(tree: Tree, dtype: Any = None) -> Any:
    """Returns float arrays for the kernels of a tree, or for one kernel.

    Args:
        tree: A QTensor or StraightThrough, or a tree that holds some; other leaves are
            left alone.
        dtype: Dtype of the result, by default the kernel's. Weights are rounded to the
            kernel's dtype first.

    Raises:
        TypeError: If an adapter is in the tree: `merge` is for those; or if `dtype` is
            not floating-point.
        ValueError: If the tree was restored without its structure.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.dequantize(ql.quantize(jnp.ones((64, 2)), "nf4")).dtype
        dtype('float32')
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating-point. Got {jnp.dtype(dtype)}.")

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Kernel):
            return leaf.dequantize(dtype)
        if is_tree_leaf(leaf):
            raise TypeError(
                "`tree` must not hold adapters: use merge. Got "
                f"{type(leaf).__name__} at {path!r}."
            )
        return leaf

    check_structure(leaves_by_path(tree))
    return map_by_path(one, tree)
