"""Quantize and dequantize, the same verbs on an array and on a tree; `init`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..lora.adapter import AdaptedKernel, LoRA
from ..lora.config import QLoRAConfig
from ..lora.initializers import init_lora
from ..quant.geometry import Geometry
from ..quant.kernel import (
    check_kernel,
    dequantize_kernel,
    quantize_checked,
    quantize_kernel,
)
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough
from .tree import (
    Tree,
    check_donated,
    find_targets,
    is_device_array,
    leaves_by_path,
    map_by_path,
    nested,
    unbox,
)


def init(
    key: Any,
    params: Tree,
    config: QLoRAConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    problems: Mapping[str, str] | None = None,
    donate: bool = False,
) -> tuple[Tree, dict]:
    """Quantizes the targets of a parameter tree and gives each an adapter.

    Args:
        key: PRNG key for A.
        params: Any pytree of arrays; boxes such as `nn.Partitioned` are taken off the
            targets.
        config: What to target, and how.
        kinds: As in `find_targets`; the Flax doors give it.
        problems: As in `find_targets`; likewise.
        donate: Delete each targeted float array once it is quantized, so that memory
            peaks at the float tree plus one packed leaf. Does nothing under jit, to
            NumPy arrays, or where targets stay in float. Arrays that stand at two paths
            are refused.

    Returns:
        The base tree (as `params`, frozen kernels at the targets) and the lora tree.

    Raises:
        ValueError: As `find_targets`, or if `donate` is set and a target shares its
            array with another leaf; before any work is done.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"q_proj": {"kernel": jnp.ones((64, 8))}, "norm": jnp.ones(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> base["q_proj"]["kernel"].fmt, lora["q_proj"]["kernel"].rank
        ('nf4', 4)
    """
    geometries = find_targets(params, config, kinds, problems)
    base = _freeze(params, config, geometries, donate, pack=config.freeze_base)
    kernels = leaves_by_path(base)
    adapters = {}
    keys = jax.random.split(key, len(geometries))
    for key, (path, geometry) in zip(keys, geometries.items(), strict=True):
        shape = jax.eval_shape(geometry.to_matrix, _shape_of(kernels[path])).shape
        adapters[path] = init_lora(
            key,
            shape,
            geometry,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            dropout=config.dropout,
            dtype=config.lora_dtype,
        )
    return base, nested(adapters)


def _shape_of(kernel):
    return jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)


def _freeze(params, config, geometries, donate, *, pack):
    """Packs the targets, or with `pack=False` lets them be trained as if packed."""

    def freeze(path, leaf):
        if path not in geometries:
            return leaf
        w = unbox(leaf)
        if config.fmt is None:
            return w
        w = w.kernel if isinstance(w, StraightThrough) else w
        settings = (config.fmt, config.block_size, config.double_quant)
        if not pack:
            return StraightThrough(jnp.asarray(w), *settings, geometries[path])
        q = quantize_checked(w, *settings, geometries[path])
        if donate:
            _delete(w, q)
        return q

    if donate and config.fmt is not None and pack:
        check_donated(params, geometries)
    return map_by_path(freeze, params)


def _delete(w, q):
    """Deletes a float array, if it is one of JAX's, once `q` is made of it."""
    if is_device_array(w):
        jax.block_until_ready(q)
        w.delete()


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
        return _freeze(params, fmt, targets, donate, pack=fmt.freeze_base or trained)
    if isinstance(params, StraightThrough):
        q = params.to_qtensor()
        if donate:
            _delete(params.kernel, q)
        return q
    if isinstance(params, Mapping):
        raise TypeError("a tree must come with a QLoRAConfig. Got none.")
    check_kernel(params)
    axes = (contract,) if isinstance(contract, int) else tuple(contract)
    q = quantize_kernel(
        params,
        fmt,
        block_size=block_size,
        double_quant=double_quant,
        geometry=Geometry.contracting(axes, params.shape),
    )
    if donate:
        _delete(params, q)
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
        if isinstance(leaf, StraightThrough):
            return leaf.quantized_value(dtype)
        if isinstance(leaf, QTensor):
            return dequantize_kernel(leaf, None if dtype is None else jnp.dtype(dtype))
        return leaf

    return map_by_path(one, tree)
