"""Adds adapters to their kernels, and merges several adapters into one."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32

from .._jax.arguments import known_values
from .._jax.memory import all_below, is_concrete
from ..adapters.base import Adapter
from ..adapters.lora import LoRA
from ..adapters.merge_aware import MergeAware, is_merge_aware
from ..quant.kernel import Kernel, as_kernel
from ..quant.pack import StraightThrough, check_values, quantize_unchecked
from ..quant.qtensor import QTensor, with_scales
from ..quant.schemes import SMALLEST_NORMAL, with_e4m3_divisor
from .adapters import adapters_by_keys, check_lora_trees, checked_adapters
from .paths import (
    KeyPath,
    Leaf,
    Tree,
    fused_with,
    leaves_by_path,
    map_by_path,
    nested_by_keys,
    path_string,
    raise_if_any,
)
from .quantize import dequantize

_WeightedLoRA = tuple[LoRA, float]  # an adapter and its weight in the sum

FLOAT32_MAX = float(np.finfo(np.float32).max)


@jax.jit
def _merge_kernel(leaf: Leaf, lora: Adapter) -> Array:
    return lora.merged(as_kernel(leaf, lora.geometry))


@jax.jit
def _is_finite(packed: QTensor) -> Bool[Array, ""]:
    return jnp.all(jnp.isfinite(packed.dequantize()))


@jax.jit
def _pack_merged(leaf: Leaf, lora: MergeAware) -> QTensor:
    return lora.packed(as_kernel(leaf, lora.geometry))


@overload
def merge(
    base: QTensor | StraightThrough, lora: Adapter, *, requantize: Literal[True]
) -> QTensor: ...
@overload
def merge(
    base: Kernel | jax.Array, lora: Adapter, *, requantize: Literal[False] = False
) -> jax.Array: ...
@overload
def merge(base: Tree, lora: Tree, *, requantize: bool = False) -> Tree: ...
def merge(base: Tree, lora: Tree, *, requantize: bool = False) -> Tree:
    """Returns a plain parameter tree, with the adapters added to their kernels.

    Each kernel becomes `W + scaling * A B` (LoRA, Hu et al. 2021, section 4.1), summed
    in float32 and rounded once to its dtype. With a `MergeAware` adapter, it becomes
    the weights that training used: those of the packed sum. The result is
    differentiable in the adapters.

    Args:
        base: The base tree, or one kernel.
        lora: The lora tree, or one adapter.
        requantize: Pack the merged kernels again, each in its own format, or in the
            format that its `MergeAware` adapter was trained for. Float kernels without
            a `MergeAware` adapter stay in float; kernels that are trained through their
            quantization are packed too. Unless an adapter is `MergeAware`, changes of
            less than half a step are rounded away, and most of the adapter is lost. To
            merge such an adapter into 4 bits, merge into the original float weights
            instead, and `quantize` the result.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If an adapter has no kernel in `base` or does not fit it; if a tree
            was restored without its structure; or, outside jit, if merged weights that
            are to be packed are not finite, or too large for the format. All of these
            kernels are listed.

    Warns:
        UserWarning: Outside jit, with the largest changes of a kernel by requantizing
            and by the adapter, in percent (relative Frobenius norm).

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> ql.merge(base, lora)["kernel"].dtype
        dtype('float32')
    """
    adapters = checked_adapters(base, lora)
    problems: dict[str, str] = {}
    changes: list[tuple[Array, Array]] = []

    def merge_leaf(path: str, leaf: Leaf) -> Leaf:
        kernel, adapter = as_kernel(leaf), adapters.get(path)
        # 1. Keep the codes of a packed kernel without an adapter: packing its decoded
        #    weights again could change them.
        if requantize and adapter is None and kernel.is_packed:
            return leaf
        if requantize and is_merge_aware(adapter):
            packed = _pack_merged(leaf, adapter)  # what the adapter was trained for
            if not is_concrete(packed.codes) or _is_finite(packed):
                return packed
            problems[path] = "weights must be finite. Got NaN or infinite values."
            return leaf
        # 2. Add the adapter, in float. Kernels without one that are trained through
        #    their quantization are packed from their float weights, as in training.
        if adapter is not None:
            merged = _merge_kernel(leaf, adapter)
        else:
            merged = kernel.value if requantize else dequantize(leaf)
        packing = kernel.packing
        if not requantize or packing is None:
            return merged
        # 3. Pack again, and measure the changes by the packing and by the adapter.
        try:
            check_values(merged, packing, leaf.geometry)
        except ValueError as error:
            problems[path] = str(error)
            return leaf
        packed = quantize_unchecked(merged, packing, leaf.geometry)
        if is_concrete(packed.codes) and adapter is not None:
            changes.append(_relative_changes(leaf, merged, packed))
        return packed

    tree = map_by_path(merge_leaf, base)
    raise_if_any("these merged kernels cannot be packed", problems)
    if requantize:
        paths = [path for path, x in adapters.items() if is_merge_aware(x)]
        tree = _with_common_divisors(tree, paths)
    if changes:
        rounding, change = (100 * float(max(c)) for c in zip(*changes, strict=True))
        warnings.warn(
            f"requantizing moved the merged kernels by up to {rounding:.2g}% (relative "
            f"Frobenius norm); the adapters had changed them by up to {change:.2g}%.",
            UserWarning,
            stacklevel=2,
        )
    return tree


def _with_common_divisors(tree: Tree, paths: Sequence[str]) -> Tree:
    """Gives one NVFP4 divisor to kernels at `paths` that servers fuse.

    `quantize` shares divisors too, but a merge-aware adapter is trained without the
    other kernels. Its divisors are therefore computed from powers of two, so that they
    can be shared afterwards (`MergeAware.packed`). A kernel of which values would
    change keeps its divisor (see `with_e4m3_divisor`).
    """
    leaves = leaves_by_path(tree)
    kernels = {p: leaves[p] for p in paths if leaves[p].packing.scheme.uses_largest}

    def share_divisor(path: str, leaf: Leaf) -> Leaf:
        if path not in kernels:
            return leaf
        fused = [kernels[p].scale_scales for p in fused_with(path) if p in kernels]
        # Kernels that are stacked in different ways cannot be fused. Share the smallest
        # divisor, which is that of the largest weight.
        divisors = [x[..., 1] for x in fused if x.shape == leaf.scale_scales.shape]
        return _with_divisor(leaf, functools.reduce(jnp.minimum, divisors))

    return map_by_path(share_divisor, tree)


@jax.jit
def _with_divisor(q: QTensor, divisor: Float32[Array, "*batch"]) -> QTensor:
    return with_scales(q, with_e4m3_divisor(q.stored_scales, divisor))


@jax.jit
def _relative_changes(
    before: Leaf, merged: Array, packed: QTensor
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    merged = merged.astype(jnp.float32)
    # Squares of very large weights would overflow, and those of very small ones vanish.
    # So weights are first divided by the largest, in two steps, because its reciprocal
    # might be flushed to zero.
    factor = lax.rsqrt(jnp.max(jnp.abs(merged), initial=SMALLEST_NORMAL))

    def norm(w: Array) -> Float32[Array, ""]:
        return jnp.sqrt(jnp.sum(jnp.square(w * factor * factor)))

    # The floor avoids 0 / 0 for a kernel of zeros.
    merged_norm = jnp.maximum(norm(merged), 1e-30)
    rounding = norm(dequantize(packed) - merged)
    change = norm(merged - dequantize(before))
    return rounding / merged_norm, change / merged_norm


def merge_adapters(
    adapters: Sequence[Tree],
    weights: Sequence[float],
    *,
    method: Literal["cat", "linear"] = "cat",
) -> Tree:
    """Returns one lora tree for a weighted sum of adapters of one base.

    The methods are those of PEFT's `add_weighted_adapter`. The result has scaling 1:
    weights and scalings are multiplied into A, or into A and B. Its dtype can represent
    the dtypes of all adapters.

    Args:
        adapters: Lora trees of one base. A tree that lacks a path adds nothing there.
        weights: One finite weight for each adapter; negative weights subtract.
        method: "cat" is the exact sum, and its rank is the sum of the ranks. "linear"
            adds up all A, and all B, each multiplied by `sqrt(weight * scaling)` of its
            adapter. The result differs from the sum, since it also multiplies one
            adapter's A by another's B; ranks must be equal.

    Raises:
        TypeError: If `adapters` is a single tree, or `adapters` or `weights` is not a
            sequence.
        ValueError: If there are no adapters, the number of weights differs, a weight is
            not finite, or the method is unknown; or if adapters are not a `LoRA`, or
            differ in shape or dropout at a path, or, outside jit, if A or B of the
            result overflows its dtype; all are listed.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=4))
        >>> other = jax.tree.map(lambda x: x + 1, lora)
        >>> ql.merge_adapters([lora, other], [0.5, 0.5])["kernel"].rank
        8
    """
    check_lora_trees(adapters)
    if method not in _METHODS:
        raise ValueError(f"`method` must be one of {[*_METHODS]}. Got {method!r}.")
    try:
        num_weights = len(weights)
    except TypeError:
        raise TypeError(
            f"`weights` must be a sequence of numbers. Got {weights!r}."
        ) from None
    if not adapters or len(adapters) != num_weights:
        raise ValueError(
            "`weights` must have one weight for each adapter, and `adapters` at least "
            f"one. Got {num_weights} weights for {len(adapters)} adapters."
        )
    if not all(map(_is_finite_number, weights)):
        raise ValueError(f"`weights` must be finite numbers. Got {[*weights]}.")
    # Collect the adapters of each kernel with their weights, in order.
    sums: dict[KeyPath, list[_WeightedLoRA]] = {}
    for tree, weight in zip(adapters, weights, strict=True):
        for keys, adapter in adapters_by_keys(tree).items():
            sums.setdefault(keys, []).append((adapter, weight))  # pyright: ignore
    problems = {path_string(k): _mismatch(pairs, method) for k, pairs in sums.items()}
    raise_if_any("these adapters cannot be merged", problems)

    def merge_loras(pairs: list[_WeightedLoRA]) -> Adapter:
        a, b = _METHODS[method](pairs)
        dtype = jnp.result_type(*(x for lora, _ in pairs for x in (lora.a, lora.b)))
        a, b = a.astype(dtype), b.astype(dtype)
        return dataclasses.replace(pairs[0][0], a=a, b=b, scaling=1.0)

    merged = {keys: merge_loras(pairs) for keys, pairs in sums.items()}
    raise_if_any(
        "these merged adapters overflow. Use smaller weights",
        {path_string(k): _overflow(merged[k], pairs) for k, pairs in sums.items()},
    )
    return nested_by_keys(merged)


def _overflow(merged: Adapter, pairs: list[_WeightedLoRA]) -> str | None:
    def is_finite(lora: Adapter) -> bool:
        arrays = lora.arrays.values()
        return all(all_below(x, math.inf) for x in arrays if is_concrete(x))

    # Adapters that are not finite themselves, because training diverged, are merged.
    if is_finite(merged) or not all(is_finite(lora) for lora, _ in pairs):
        return None
    return f"A and B must be finite. Got infinite values in {merged.arrays['a'].dtype}."


def _is_finite_number(weight: object) -> bool:
    value = known_values("weights", weight)
    if value is None:  # traced: unknown until the program runs
        return True
    is_real = any(jnp.issubdtype(value.dtype, x) for x in (jnp.integer, jnp.floating))
    is_number = is_real and not value.ndim  # weights are scalars
    # Python integers may be too large for float32.
    return is_number and abs(float(value)) <= FLOAT32_MAX


# A and B of a merged adapter in float32, before they are cast to the result's dtype.
_Merged = tuple[Float32[Array, "*batch k r"], Float32[Array, "*batch r n"]]


def _coefficient(lora: LoRA, weight: float) -> Float32[Array, ""]:
    return jnp.asarray(weight, jnp.float32) * jnp.float32(lora.scaling)


def _cat(pairs: list[_WeightedLoRA]) -> _Merged:
    # [c1 A1, c2 A2] [B1; B2] = c1 A1 B1 + c2 A2 B2
    a = [x.a.astype(jnp.float32) * _coefficient(x, weight) for x, weight in pairs]
    b = [x.b.astype(jnp.float32) for x, _ in pairs]
    return jnp.concatenate(a, -1), jnp.concatenate(b, -2)


def _linear(pairs: list[_WeightedLoRA]) -> _Merged:
    # The result also has terms such as sqrt(c1 c2) A1 B2, as in PEFT.
    a = b = jnp.float32(0)
    for lora, weight in pairs:
        coefficient = _coefficient(lora, weight)
        root = jnp.sqrt(jnp.abs(coefficient))
        # The sign goes into A alone, since the root of a negative number is not real.
        a += jnp.sign(coefficient) * root * lora.a.astype(jnp.float32)
        b += root * lora.b.astype(jnp.float32)
    return a, b


_METHODS = {"cat": _cat, "linear": _linear}


def _mismatch(pairs: list[_WeightedLoRA], method: str) -> str | None:
    loras = [lora for lora, _ in pairs]
    # Of the kinds of this library, only `LoRA` is linear.
    if other_kinds := [x.label for x in loras if not x.is_linear]:
        return f"each must be a lora. Got {other_kinds}."
    if len({(x.matrix_shape, x.geometry) for x in loras}) > 1:
        shapes = [x.matrix_shape for x in loras]
        return f"each must be of one kernel, with equal axes. Got shapes {shapes}."
    if len(rates := {x.dropout for x in loras}) > 1:
        return f"dropout must be equal. Got {sorted(rates)}."
    ranks = [x.rank for x in loras]
    if method == "linear" and len({*ranks}) > 1:
        return f"ranks must be equal for `method` linear. Got {ranks}."
    return None
