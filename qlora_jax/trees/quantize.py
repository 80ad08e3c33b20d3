"""Quantize and dequantize, the same verbs on an array and on a tree; `init`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from .._jax.memory import delete
from ..adapters.config import QLoRAConfig
from ..adapters.lora import AdaptedKernel, LoRA
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel
from ..quant.quantize import (
    check_kernel,
    quantize_checked,
    quantize_kernel,
)
from ..quant.settings import Packing
from ..quant.straight_through import StraightThrough
from .paths import Tree, leaves_by_path, map_by_path, unbox
from .targets import check_donated, find_targets


def freeze_targets(params, config, geometries, donate, *, pack):
    """Packs the targets, or with `pack=False` lets them be trained as if packed."""

    def freeze(path, leaf):
        if path not in geometries:
            return leaf
        w = unbox(leaf)
        if config.packing is None:
            return w
        w = w.kernel if isinstance(w, StraightThrough) else w
        if not pack:
            return StraightThrough(jnp.asarray(w), config.packing, geometries[path])
        q = quantize_checked(w, config.packing, geometries[path])
        if donate:
            delete(w, q)
        return q

    if donate and config.fmt is not None and pack:
        check_donated(params, geometries)
    return map_by_path(freeze, params)


def quantize(
    params: Tree,
    fmt: str | QLoRAConfig = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    contract: int | tuple[int, ...] = -2,
    donate: bool = False,
) -> Any:
    """Quantizes an array, or the targets of a whole tree.

    Blockwise k-bit quantization with a table of values (QLoRA, Dettmers et al. 2023,
    section 3); codes and scales equal bitsandbytes' for "nf4" and "fp4".

    Args:
        params: A float array `[..., K, N]` (or one with other contracted axes); or a
            tree, with a config.
        fmt: The number format: "nf4", "fp4", "int4" or "int8"; or a `QLoRAConfig`,
            which says all the rest.
        block_size: Weights along K that share a scale: a power of two, 16 to 4096.
        double_quant: Whether the scales are quantized too.
        contract: The contracted axes, negative.
        donate: As in `init`: of float arrays that are packed, and JAX's.

    Returns:
        A QTensor, whose leaves `QTensor` lists; or the tree with frozen kernels at the
        targets. Kernels that are trained through their quantization
        (`freeze_base=False`) are packed by the same call, alone or in a tree, in their
        own settings: those of the config must be the same.

    Raises:
        TypeError: If the array is not floating-point.
        ValueError: If a setting is out of range or stands beside a config, or, outside
            jit, a weight is not finite; for a tree as `init`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.quantize(jnp.ones((128, 8)), "int4", block_size=32).scales.shape
        (4, 8)
    """
    if isinstance(fmt, QLoRAConfig):
        if (block_size, double_quant, contract) != (64, True, -2):
            raise ValueError(
                "`block_size`, `double_quant` and `contract` must not stand beside a "
                f"config. Got {block_size}, {double_quant} and {contract}."
            )
        targets = find_targets(params, fmt, trained=True)
        leaves = leaves_by_path(params)
        trained = any(isinstance(leaves[path], StraightThrough) for path in targets)
        return freeze_targets(
            params, fmt, targets, donate, pack=fmt.freeze_base or trained
        )
    if isinstance(params, StraightThrough):
        q = params.to_qtensor()
        if donate:
            delete(params.kernel, q)
        return q
    if isinstance(params, Mapping):
        raise TypeError("a tree must come with a QLoRAConfig. Got none.")
    check_kernel(params)
    axes = (contract,) if isinstance(contract, int) else tuple(contract)
    packing = Packing(fmt, block_size, double_quant)
    q = quantize_kernel(params, packing, Geometry.contracting(axes, params.shape))
    if donate:
        delete(params, q)
    return q


def dequantize(tree: Tree, dtype: Any = None) -> Any:
    """Returns float arrays for the kernels of a tree, or for one kernel.

    Args:
        tree: A QTensor, or a tree that holds some; other leaves are left alone.
        dtype: Dtype of the result; the kernel's own where not given. Weights are
            rounded to the kernel's own dtype first.

    Returns:
        The tree with a float array at each kernel, in the kernel's own shape.

    Raises:
        TypeError: If an adapter is in the tree: `merge` is for those; or if `dtype` is
            not floating-point.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.dequantize(ql.quantize(jnp.ones((64, 2)), "nf4")).dtype
        dtype('float32')
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be floating-point. Got {jnp.dtype(dtype)}.")

    def one(path, leaf):
        if isinstance(leaf, AdaptedKernel | LoRA):
            raise TypeError(
                f"`tree` must hold no adapters: use merge. Got a {type(leaf).__name__} "
                f"at {path!r}."
            )
        return leaf.dequantize(dtype) if isinstance(leaf, Kernel) else leaf

    return map_by_path(one, tree)
