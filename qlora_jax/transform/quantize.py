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
    is_concrete,
    is_finite,
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
    refuse_listed,
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
            peaks at the float tree plus one packed leaf. Does nothing under jit. Arrays
            that stand at two paths are refused.

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
    base = _freeze(params, config, geometries, donate)
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


def _freeze(params, config, geometries, donate):
    def freeze(path, leaf):
        if path not in geometries:
            return leaf
        w = unbox(leaf)
        if config.fmt is None:
            return w
        settings = (config.fmt, config.block_size, config.double_quant)
        if not config.freeze_base:
            return StraightThrough(jnp.asarray(w), *settings, geometries[path])
        q = quantize_checked(w, *settings, geometries[path])
        if donate:
            _delete(w, q)
        return q

    if donate and config.fmt is not None and config.freeze_base:
        check_donated(params, geometries)
    return map_by_path(freeze, params)


def _delete(w, q):
    """Deletes a float array, if it is one of JAX's, once `q` is made of it."""
    if is_device_array(w):
        jax.block_until_ready(q)
        w.delete()


def quantize(
    params: Tree,
    how: str | QLoRAConfig = "nf4",
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
            tree, `how` then being a config.
        how: The number format: "nf4", "fp4", "int4" or "int8"; or a `QLoRAConfig`,
            which says all the rest.
        block_size: Weights along K that share a scale: a power of two, 16 to 4096.
        double_quant: Whether the scales are quantized too.
        contract: The contracted axes, negative.
        donate: As in `init`.

    Returns:
        A QTensor; or the tree with frozen kernels at the targets. A tree of kernels
        that are trained through their quantization (`freeze_base=False`) is packed by
        the same call.

    Raises:
        TypeError: If the array is not floating-point.
        ValueError: If a setting is out of range, or, outside jit, a weight is not
            finite; for a tree as `init`.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.quantize(jnp.ones((128, 8)), "int4", block_size=32).scales.shape
        (4, 8)
    """
    if isinstance(how, QLoRAConfig):
        if any(isinstance(x, StraightThrough) for x in leaves_by_path(params).values()):
            return _pack_trained(params, donate)
        return _freeze(params, how, find_targets(params, how), donate)
    if isinstance(params, StraightThrough):
        q = params.to_qtensor()
        if donate:
            _delete(params.kernel, q)
        return q
    check_kernel(params)
    axes = (contract,) if isinstance(contract, int) else tuple(contract)
    w = params
    q = quantize_kernel(
        w,
        how,
        block_size=block_size,
        double_quant=double_quant,
        geometry=Geometry.contracting(axes, w.shape),
    )
    if donate:
        _delete(w, q)
    return q


def _pack_trained(tree, donate):
    leaves = leaves_by_path(tree)
    trained = {p: x for p, x in leaves.items() if isinstance(x, StraightThrough)}
    refuse_listed(
        "these kernels cannot be packed",
        [
            f"{path}: weights must be finite. Got NaN or infinite values."
            for path, x in trained.items()
            if is_concrete(x.kernel) and not is_finite(x.kernel)
        ],
    )
    if donate:
        check_donated(tree, trained)

    def pack(path, leaf):
        if path not in trained:
            return leaf
        settings = (leaf.fmt, leaf.block_size, leaf.double_quant, leaf.geometry)
        q = quantize_checked(leaf.kernel, *settings)
        if donate:
            _delete(leaf.kernel, q)
        return q

    return map_by_path(pack, tree)


def dequantize(tree: Tree, dtype: Any = None) -> Any:
    """Returns float arrays for the kernels of a tree, or for one kernel.

    Args:
        tree: A QTensor, or a tree that holds some; other leaves are left alone.
        dtype: Dtype of the result; the kernel's own where not given. Weights are
            rounded to the kernel's own dtype first.

    Returns:
        The tree with a float array at each kernel, in the kernel's own shape.

    Raises:
        TypeError: If an adapter is in the tree: `merge` is for those.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.dequantize(ql.quantize(jnp.ones((64, 2)), "nf4")).dtype
        dtype('float32')
    """

    def one(path, leaf):
        if isinstance(leaf, AdaptedKernel | LoRA):
            raise TypeError(
                f"`tree` must hold no adapters: use merge. Got a {type(leaf).__name__} "
                f"at {path!r}."
            )
        if isinstance(leaf, StraightThrough):
            value = leaf.quantized_value()
            return value if dtype is None else value.astype(dtype)
        if isinstance(leaf, QTensor):
            return dequantize_kernel(leaf, None if dtype is None else jnp.dtype(dtype))
        return leaf

    return map_by_path(one, tree)
