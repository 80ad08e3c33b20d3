"""Adds adapters to their kernels."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._jax.memory import is_concrete
from .._jax.pytree import on_arrays
from ..adapters.base import Adapter
from ..quant.kernel import Kernel, as_kernel, is_packed
from ..quant.pack import check_values, quantize_checked
from ..quant.qtensor import QTensor
from ..quant.straight_through import StraightThrough
from .adapters import adapters_by_path
from .paths import Tree, map_by_path, refuse_listed
from .quantize import dequantize


@jax.jit
def _merge_kernel(leaf: Any, lora: Adapter) -> Array:
    return lora.merged(as_kernel(leaf, lora.geometry))


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
    """Returns a plain parameter tree, the adapters added to their kernels.

    Each kernel becomes `W + scaling * A B` (LoRA, Hu et al. 2021, section 4.1), summed
    in float32 and rounded once to the kernel's dtype. Differentiable in the adapters.

    Args:
        base: The base tree, or one kernel.
        lora: The lora tree, or one adapter.
        requantize: Pack the merged kernels again, each in its format. That rounds every
            weight once more: a change of less than half a step goes back to the value
            that it had, and most of an adapter is lost. To merge into 4 bits, merge
            into the float weights that the base was made from, and `quantize` those.
            Kernels that are trained through their quantization are packed too; those
            without a format stay in float.

    Raises:
        TypeError: If `base` is a combined tree.
        ValueError: If an adapter has no kernel in `base`, or does not fit it; if a tree
            was restored without its structure; or, outside jit, if merged weights that
            are to be packed are not finite: all of those are named.

    Warns:
        UserWarning: Outside jit, by how many percent requantizing and the adapters
            changed the kernels (relative Frobenius norm).

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> ql.merge(base, lora)["kernel"].dtype
        dtype('float32')
    """
    adapters = adapters_by_path(base, lora)
    problems: dict[str, str] = {}
    changes: list = []

    def one(path: str, leaf: Any) -> Any:
        adapter = adapters.get(path)
        if requantize and adapter is None and is_packed(leaf):
            return leaf
        merged = dequantize(leaf) if adapter is None else _merge_kernel(leaf, adapter)
        packing = as_kernel(leaf).packing
        if not requantize or packing is None:
            return merged
        try:
            check_values(merged, packing, leaf.geometry)
        except ValueError as error:
            problems[path] = str(error)
            return leaf
        packed = quantize_checked(merged, packing, leaf.geometry)
        if is_concrete(packed.codes) and adapter is not None:
            changes.append(_relative_changes(leaf, merged, packed))
        return packed

    tree = map_by_path(one, base)
    refuse_listed("these merged kernels cannot be packed", problems)
    if changes:
        rounding, change = (100 * float(max(c)) for c in zip(*changes, strict=True))
        warnings.warn(
            f"requantizing moved the merged kernels by up to {rounding:.2g}% (relative "
            f"Frobenius norm); the adapters had changed them by up to {change:.2g}%.",
            UserWarning,
            stacklevel=2,
        )
    return tree


@jax.jit
def _relative_changes(before: Any, merged: Any, packed: Any) -> tuple[Array, Array]:
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
    whole = jnp.maximum(norm(merged), 1e-30)
    rounding = norm(dequantize(packed) - merged)
    change = norm(merged - dequantize(before))
    return rounding / whole, change / whole


def with_float_kernels(
    fn: Callable[..., Any], *, policy: Callable[..., bool] | None = None
) -> Callable[..., Any]:
    """Returns `fn(merge(base, lora), ...)` as a function of a base and a lora tree.

    For layers that need float weights, such as convolutions. The float weights,
    adapters merged in, exist only during the call. The backward pass computes them and
    `fn` again (`jax.checkpoint`), so wrap one layer, not a model. `lora` may be None.

    Args:
        fn: A function of a tree of float parameters, and of other arguments.
        policy: As in `jax.checkpoint`: which intermediate values of `fn` are kept, by
            default none. A policy that keeps matrix products also keeps the adapters'
            `A B`, as large as the kernels.

    Raises:
        TypeError: As `merge`, when the returned function is called.
        ValueError: As `merge`, when the returned function is called.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> layer = lambda params, x: jnp.tanh(x @ params["kernel"])
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=2))
        >>> ql.with_float_kernels(layer)(base, lora, jnp.ones((2, 64))).shape
        (2, 8)
    """

    @functools.wraps(fn)
    def call(base: Tree, lora: Tree, *args: Any, **kwargs: Any) -> Any:
        def run(inputs: tuple) -> Any:
            base, lora, args, kwargs = inputs
            return fn(merge(base, lora), *args, **kwargs)

        checkpoint = functools.partial(jax.checkpoint, policy=policy)
        return on_arrays(checkpoint, run, (base, lora, args, kwargs))

    return call
