"""`quantize` and `dequantize`, on one array or on a tree."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Float32

from .._jax.memory import check_donated, delete, largest_magnitude
from .._jax.pytree import is_tree_leaf
from ..adapters.config import QLoRAConfig
from ..quant.formats import Packing, checked_result_dtype
from ..quant.geometry import Contract, Geometry, to_matrix
from ..quant.kernel import Kernel, as_kernel, is_kernel
from ..quant.pack import (
    StraightThrough,
    check_kernel,
    quantize_kernel,
    quantize_unchecked,
)
from ..quant.qtensor import QTensor
from .adapters import check_structure
from .paths import (
    Leaf,
    Tree,
    fused_with,
    leaves_by_path,
    map_by_path,
)
from .targets import find_targets


def as_base_leaf(
    kernel: Kernel,
    config: QLoRAConfig,
    largest_weight: Array | None = None,
    *,
    donate: bool = False,
) -> Leaf:
    """Returns the base leaf of a float kernel: a QTensor, StraightThrough or array."""
    w, geometry, packing = kernel.value, kernel.geometry, config.packing
    if packing is None:  # LoRA on float weights
        return w
    if not config.freeze_base:  # the kernel is trained through its quantizer
        return StraightThrough(jnp.asarray(w), packing, geometry)
    largest = () if largest_weight is None else (largest_weight,)
    q = quantize_unchecked(w, packing, geometry, *largest)
    if donate:
        delete(w, q)  # waits for q, and frees the float array
    return q


def largest_weights_of(
    leaves: Mapping[str, Leaf],
    geometries: Mapping[str, Geometry],
    packing: Packing | None,
) -> dict[str, Float32[Array, "*batch"]]:
    """Returns, by target, the largest weight of all kernels that are fused with it."""
    # Servers fuse q, k and v, or gate and up. In NVFP4, the fused kernels must have the
    # same float32 divisor, which depends on the largest weight. Other formats have no
    # divisor, and kernels that were trained with their own divisor keep it.
    if packing is None or not packing.scheme.uses_largest:
        return {}
    kernels = {path: as_kernel(leaves[path], geometries[path]) for path in geometries}
    largest_weights = {
        path: _largest_weight(kernel.value, kernel.geometry)
        for path, kernel in kernels.items()
        if not (kernel.is_packed or kernel.is_trained)
    }

    def largest_of_fused(path: str) -> Array:
        weight = largest_weights[path]
        fused = [largest_weights[p] for p in fused_with(path) if p in largest_weights]
        # Kernels that are stacked in different ways cannot be fused.
        same_shape = [x for x in fused if x.shape == weight.shape]
        return functools.reduce(jnp.maximum, same_shape, weight)

    return {path: largest_of_fused(path) for path in largest_weights}


def _largest_weight(w: Array | np.ndarray, geometry: Geometry) -> Array:
    if not isinstance(w, np.ndarray):
        return _max_abs(w, geometry)
    axes = *geometry.axes("k", w.ndim), *geometry.axes("n", w.ndim)
    return jnp.asarray(largest_magnitude(w, axes), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def _max_abs(w: Float[Array, "..."], geometry: Geometry) -> Float32[Array, "*batch"]:
    matrix = to_matrix(geometry, w).astype(jnp.float32)  # [*batch, K, N]
    return jnp.max(jnp.abs(matrix), axis=(-1, -2), initial=0)


def _quantize_tree(params: Tree, config: QLoRAConfig, donate: bool) -> Tree:
    leaves = leaves_by_path(params)
    geometries = find_targets(leaves, config, accept=lambda kernel: kernel.is_trained)
    # Kernels that were trained through their quantization are packed for serving, even
    # though their config has `freeze_base=False`.
    if any(as_kernel(leaves[path]).is_trained for path in geometries):
        config = dataclasses.replace(config, freeze_base=True)
    if donate and config.freeze_base and config.packing is not None:
        check_donated(leaves, geometries)
    largest_weights = largest_weights_of(leaves, geometries, config.packing)

    def quantize_leaf(path: str, leaf: Leaf) -> Leaf:
        if path not in geometries:
            return leaf
        kernel = as_kernel(leaf, geometries[path])
        return as_base_leaf(kernel, config, largest_weights.get(path), donate=donate)

    return map_by_path(quantize_leaf, params)


def _check_settings_of_trained(
    kernel: StraightThrough,
    fmt: str,
    block_size: int | None,
    double_quant: bool | None,
    contract: Contract,
) -> None:
    """Raises ValueError if arguments of `quantize` differ from a kernel's settings."""
    # A `fmt` of "nf4" is not compared, because it may just be the default.
    settings = {
        "fmt": None if fmt == "nf4" else fmt,
        "block_size": block_size,
        "double_quant": double_quant,
    }
    wrong = {
        name: value
        for name, value in settings.items()
        if value is not None and value != getattr(kernel.packing, name)
    }
    geometry, ndim = kernel.geometry, kernel.ndim
    expected = Geometry.contracting(contract, kernel.shape)
    if contract != -2 and expected.roles(ndim) != geometry.roles(ndim):
        wrong["contract"] = contract
    if wrong:
        raise ValueError(
            "weights that were trained through their quantization are packed with the "
            f"settings of their training: {kernel.packing} and axes "
            f"{geometry.kinds!r}. Got {wrong}."
        )


@overload
def quantize(
    params: ArrayLike | StraightThrough,
    fmt: str = "nf4",
    *,
    block_size: int | None = None,
    double_quant: bool | None = None,
    contract: Contract = -2,
    donate: bool = False,
) -> QTensor: ...
@overload
def quantize(
    params: Tree,
    fmt: QLoRAConfig,
    *,
    donate: bool = False,
) -> Tree: ...
def quantize(
    params: Tree,
    fmt: str | QLoRAConfig = "nf4",
    *,
    block_size: int | None = None,
    double_quant: bool | None = None,
    contract: Contract = -2,
    donate: bool = False,
) -> Tree:
    """Returns an array as a QTensor, or a tree with frozen kernels at the targets.

    Blockwise k-bit quantization with a table of values (QLoRA, Dettmers et al. 2023,
    section 3). Codes and scales equal those of bitsandbytes for "nf4" and "fp4", of
    compressed-tensors for "int4_f16" (also the form of AWQ and GPTQ), "mxfp4" and
    "nvfp4", and of llama.cpp for "q4_0". The scale is the largest magnitude of a block
    in "nf4" and "fp4", a seventh of it in "int4" and 1/127 of it in "int8". A block
    whose scale is below 1.18e-38, the smallest normal float32, decodes to 0
    (bitsandbytes keeps it on CPUs). Kernels that were trained through their
    quantization (`freeze_base=False`) are packed with the settings of their training. A
    config must have the same settings, and so must arguments that differ from their
    defaults.

    Args:
        params: A float array `[..., K, N]` (or one with other contracted axes) in
            bfloat16, float16, float32 or float64; or a tree, with a config.
        fmt: The number format, one of "fp4", "int4", "int8", "nf4", "int4_f16", "q4_0",
            "mxfp4" and "nvfp4"; or a `QLoRAConfig` with all settings.
        block_size: The number of weights along K that share a scale: a power of two, 16
            to 4096, by default 64, that divides K. It must be 128 (the default), 64 or
            32 for "int4_f16", 32 for "q4_0" and "mxfp4", and 16 for "nvfp4".
        double_quant: Whether to quantize the scales too, to 8 bits. Defaults to True
            for "fp4", "int4", "int8" and "nf4"; the other formats already store scales
            in 8 or 16 bits.
        contract: The contracted axes, negative, or the role of each trailing axis as
            letters ("kn", "nk", "bkn"), as in `QLoRAConfig.contract`.
        donate: Delete each float array once it is quantized, as in `init`.

    Raises:
        TypeError: If the array is not floating-point (float8 is not supported) or is a
            shape (call `quantize` under `jax.eval_shape`); if `fmt` is neither a string
            nor a config; or if `params` is a tree and `fmt` is not a config.
        ValueError: If the array has fewer than two axes; if a setting is out of range
            or combined with a config; or, outside jit, if a weight is not finite, or
            too large for the format. For a tree, as `init`.

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
                "`block_size`, `double_quant` and `contract` must not be given with a "
                f"config. Got {block_size}, {double_quant} and {contract}."
            )
        return _quantize_tree(params, fmt, donate)
    if not isinstance(fmt, str):
        raise TypeError(
            f"`fmt` must be a format's name or a QLoRAConfig. Got {type(fmt).__name__}."
        )
    # Only a mapping is certainly a tree, since an array may be of any class.
    if isinstance(params, Mapping):
        raise TypeError("a tree must be given with a QLoRAConfig. Got none.")
    if as_kernel(params).is_trained:
        _check_settings_of_trained(params, fmt, block_size, double_quant, contract)
        w, q = params.value, params.to_qtensor()  # with the settings of its training
    else:
        check_kernel(params)
        packing = Packing(fmt, block_size, double_quant)
        geometry = Geometry.contracting(contract, params.shape)
        w = params
        q = quantize_kernel(params, packing, geometry)
    if donate:
        delete(w, q)
    return q


@overload
def dequantize(tree: Kernel, dtype: DTypeLike | None = None) -> jax.Array: ...
@overload
def dequantize(tree: Tree, dtype: DTypeLike | None = None) -> Tree: ...
def dequantize(tree: Tree, dtype: DTypeLike | None = None) -> Tree:
    """Returns float arrays for the kernels of a tree, or for one kernel.

    Args:
        tree: A QTensor or StraightThrough, or a tree with such leaves. Other leaves are
            returned unchanged.
        dtype: The dtype of the result, by default the kernel's own. Weights are rounded
            to the kernel's own dtype first.

    Raises:
        TypeError: If the tree contains an adapter (use `merge`), or `dtype` is not
            floating-point.
        ValueError: If the tree was restored without its structure.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.dequantize(ql.quantize(jnp.ones((64, 2)), "nf4")).dtype
        dtype('float32')
    """
    checked_result_dtype(dtype)  # raises even if the tree has no kernel

    def dequantize_leaf(path: str, leaf: Leaf) -> Leaf:
        if is_kernel(leaf):
            return leaf.dequantize(dtype)
        if is_tree_leaf(leaf):
            raise TypeError(
                "`tree` must not hold adapters: use merge. Got "
                f"{type(leaf).__name__} at {path!r}."
            )
        return leaf

    check_structure(leaves_by_path(tree))
    return map_by_path(dequantize_leaf, tree)
