"""Applies one adapted dense layer, or looks up rows of one adapted table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._jax.arguments import check_key
from .._jax.modes import split_as
from .._jax.pytree import is_tree_leaf, unbox
from ..product.choose import as_backends
from ..product.matmul import as_float
from ..quant.geometry import UNKNOWN_AXES, Contract, Geometry
from ..quant.kernel import FloatKernel, Kernel, as_kernel
from .base import AdaptedKernel, Adapter, check_adapter, misfit_reason
from .call import Lookup
from .product import check_real, product

# The names of a layer's kernel and bias: in Flax, in PyTorch and Equinox, in Haiku.
BIAS_NAMES = {"kernel": "bias", "weight": "bias", "w": "b"}


def apply(
    base: PyTree,
    lora: PyTree,
    x: jax.Array,
    *,
    contract: Contract | None = None,
    dropout_key: Array | None = None,
    backend: str | Sequence[str] | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Returns `x W + scaling * (x A) B`, plus a bias if any, in the dtype of `x`.

    This is equation 5 of QLoRA (Dettmers et al. 2023, section 3). Both products of the
    adapter are computed in the dtype of `x` with float32 sums; the result is
    `[..., *outputs]`. Reverse-mode differentiation is supported in `x`, the adapter and
    the bias, and in a kernel that is not packed.

    Args:
        base: A kernel (QTensor, StraightThrough or float array), or a layer with one: a
            dict, a named tuple or a dataclass that is a pytree. A layer's kernel is
            called `kernel`, `weight` or `w`, and its bias `bias` or `b`. The bias has
            the kernel's output axes, `[*outputs]`, or also its batch axes, `[*batch,
            *outputs]`. Both may be in boxes such as `nn.Partitioned`.
        lora: The LoRA, or a layer with the LoRA under the name of the kernel and
            possibly a `Trained` under the name of the bias. Pass None or an empty dict
            for a layer without an adapter.
        x: A floating-point array `[..., K]`. Where a kernel has several contracted
            axes, they are the last axes of `x`; its batch axes are the first.
        contract: The contracted axes of a float kernel without an adapter, as in
            `quantize`; -2 by default. A `weight` needs it, since `[out, in]` and
            `[in, out]` are both common. Packed kernels and adapters know their axes.
        dropout_key: PRNG key of the adapter's dropout; None for no dropout.
        backend: One or more back ends, as in `matmul`, for a packed kernel.
        precision: As in `jax.lax.dot_general`.

    Raises:
        TypeError: If `x` is not floating-point, a kernel or bias is complex, `lora`
            does not hold a LoRA, or `dropout_key` is not a PRNG key.
        ValueError: If a layer has other parts than kernel and bias, or `lora` has parts
            that the layer lacks; if shapes do not fit; if the axes of a kernel are not
            known, or `contract` contradicts them; or if the back end is unknown.
        NotImplementedError: As `matmul`, if `backend` is set.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"layer": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
        >>> base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig())
        >>> ql.apply(base["layer"], lora["layer"], jnp.ones((2, 64))).shape
        (2, 8)
    """
    x, backends = as_float(x), as_backends(backend)
    if dropout_key is not None:
        check_key("dropout_key", dropout_key)
    # 1. Find the kernel, the bias and their adapters. Arrays that are trained in full
    #    (`Trained`) replace the frozen ones.
    name, w, bias = _layer_parts(base)
    kernel_lora, bias_lora = _adapter_parts(lora, name)
    if kernel_lora is not None and kernel_lora.replacement is not None:
        w = _trained_value("kernel", w, kernel_lora)
        kernel_lora = None
    if bias_lora is not None and bias_lora.replacement is not None:
        bias = _trained_value("bias", bias, bias_lora)
    elif bias_lora is not None:
        raise ValueError(f"the adapter of a bias must be a Trained. Got {bias_lora!r}.")
    kernel = _checked_kernel(name, w, kernel_lora, contract)
    # 2. Fold the contracted axes: x [..., *contracted] -> [..., K].
    geometry, shape = kernel.geometry, kernel.shape
    batch_ndim = len(kernel.matrix_shape) - 2
    contracted = tuple(shape[a] for a in geometry.axes("k", len(shape)))
    outputs = tuple(shape[a] for a in geometry.axes("n", len(shape)))
    row_ndim = x.ndim - len(contracted)
    if row_ndim < batch_ndim or x.shape[row_ndim:] != contracted:
        raise ValueError(f"`x` must end in axes {contracted}. Got shape {x.shape}.")
    rows = x.reshape(*x.shape[:row_ndim], math.prod(contracted))
    # 3. Multiply, and unfold the outputs: [..., N] -> [..., *outputs].
    y = product(rows, kernel, kernel_lora, dropout_key, backends, precision)
    y = y.reshape(*x.shape[:row_ndim], *outputs)
    return y if bias is None else _add_bias(y, bias, batch_ndim, outputs)


def _add_bias(
    y: Array, bias: Array, batch_ndim: int, outputs: tuple[int, ...]
) -> Array:
    if not hasattr(bias, "shape"):
        raise TypeError(f"the bias must be an array. Got {type(bias).__name__}.")
    check_real("the bias", bias)
    # A stack may have a bias for each of its kernels: [*batch, *outputs].
    shapes = list(dict.fromkeys([outputs, (*y.shape[:batch_ndim], *outputs)]))
    if bias.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"the bias must have shape {expected}. Got {bias.shape}.")
    batch = bias.shape[: bias.ndim - len(outputs)]
    shape = *batch, *(1,) * (y.ndim - bias.ndim), *outputs
    return y + split_as(bias.astype(y.dtype).reshape(shape), y)


def lookup(table: PyTree, lora: Adapter | None, ids: Int[Array, "..."]) -> jax.Array:
    """Returns rows of an embedding table with its adapter, `[..., D]`.

    They equal the rows of the table that `ql.merge` returns, but only these rows are
    decoded.

    Args:
        table: A float array or QTensor, `[V, D]`.
        lora: Its `TrainedRows` or `Trained`, or None.
        ids: Integers of any dtype. Negative ids count from the end, as in `jnp.take`,
            and ids outside `[-V, V)` return NaN.

    Raises:
        TypeError: If `lora` is not an adapter, or the table is complex.
        ValueError: If the table does not have two axes, the adapter does not fit it or
            is of another kind, or `ids` are not integers.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"embedding": jnp.ones((9, 64))}
        >>> rows = {"embedding": [7, 8]}
        >>> config = ql.QLoRAConfig(targets=(), trainable_rows=rows)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> ids = jnp.array([[3, 8]])
        >>> ql.lookup(base["embedding"], lora["embedding"], ids).shape
        (1, 2, 64)
    """
    table = unbox(table)
    if not hasattr(table, "shape") or len(table.shape) != 2:
        raise ValueError(
            "`table` must be a float array or a QTensor of shape [V, D]. Got "
            f"{getattr(table, 'shape', type(table).__name__)}."
        )
    check_real("`table`", table)
    check_adapter(lora, table, "table")
    return Lookup("embedding", ids, lambda rows: rows).compute(table, lora)


def _named_parts(argument: str, node: PyTree) -> dict[str, PyTree] | None:
    """Returns the parts of a layer by name, or None for a kernel, adapter or array."""
    if node is None or is_tree_leaf(node) or hasattr(node, "shape"):
        return None
    if isinstance(node, Mapping):
        return {name: unbox(part) for name, part in node.items()}
    # Flatten one level: every node below `node` is a leaf. The keys of the paths are
    # the names of the parts, if a dataclass was registered with keys.
    flat, _ = jax.tree_util.tree_flatten_with_path(node, lambda n: n is not node)
    keys = [path[-1] if path else None for path, _ in flat]
    part_names = [getattr(key, "name", getattr(key, "key", None)) for key in keys]
    if not all(isinstance(name, str) for name in part_names):
        hint = ""
        if dataclasses.is_dataclass(node):
            hint = " Register the dataclass with jax.tree_util.register_dataclass."
        raise ValueError(
            f"`{argument}` must be a layer: a dict, a named tuple or a dataclass "
            f"that is a pytree. Got {type(node).__name__}.{hint}"
        )
    parts = zip(part_names, (unbox(leaf) for _, leaf in flat), strict=True)
    return {str(name): part for name, part in parts if part is not None}


def _layer_parts(base: PyTree) -> tuple[str | None, PyTree, PyTree]:
    """Returns the name of a layer's kernel, the kernel, and the bias or None."""
    if isinstance(base, Kernel):  # saves the time of the checks below
        return None, base, None
    base = unbox(base)
    parts = _named_parts("base", base)
    if parts is None:
        return None, base, None
    if {"codes", "scales"} <= set(parts):
        raise ValueError(
            "a layer must have a kernel. Got the arrays of a QTensor, from a tree that "
            "was restored without its structure. Use ql.QTensor.from_parts."
        )
    for name, bias in BIAS_NAMES.items():
        if name in parts and set(parts) <= {name, bias}:
            return name, parts[name], parts.get(bias)
    raise ValueError(
        "a layer must have a 'kernel' (or 'weight', 'w') and at most a 'bias' (or 'b')."
        f" Got {sorted(parts)}."
    )


def _adapter_parts(lora: PyTree, name: str | None) -> list[Adapter | None]:
    """Returns the adapters of the kernel called `name` and of its bias, or None."""
    name = name or "kernel"
    bias_name = BIAS_NAMES[name]
    parts = _named_parts("lora", lora)
    if parts is None:  # an adapter of the kernel, or None
        parts = {name: lora}
    if not set(parts) <= {name, bias_name}:
        raise ValueError(
            f"`lora` must be one layer's adapters: at most a {name!r} and a "
            f"{bias_name!r}. Got {sorted(parts)}."
        )
    adapters = [parts.get(name), parts.get(bias_name)]
    for adapter in adapters:
        if adapter is not None and not isinstance(adapter, Adapter):
            raise TypeError(
                "`lora` must be a LoRA, or a layer that holds one. Got "
                f"{type(adapter).__name__}."
            )
    return adapters


def _trained_value(part_name: str, leaf: PyTree, lora: Adapter) -> PyTree:
    """Returns the trained kernel or bias that replaces the frozen one of a layer."""
    reason = "there is none" if leaf is None else misfit_reason(lora, leaf)
    if reason is not None:
        raise ValueError(f"`lora` must be the adapter of the {part_name}: {reason}")
    value = lora.merged(as_kernel(leaf))
    is_kernel = isinstance(leaf, Kernel)
    return FloatKernel(value, leaf.geometry) if is_kernel else value


def _checked_kernel(
    name: str | None, w: PyTree, lora: Adapter | None, contract: Contract | None
) -> Kernel:
    """Returns a layer's kernel, after checking that its axes are known."""
    if isinstance(w, Mapping) or not hasattr(w, "shape"):
        hint = "was the tree restored without its structure?"
        if isinstance(w, AdaptedKernel):
            hint = "`split` a combined tree first."
        raise ValueError(
            "a kernel must be a QTensor, a StraightThrough or a float array. Got "
            f"{type(w).__name__}: {hint}"
        )
    if len(w.shape) < 2:
        raise ValueError(
            f"the kernel of `base` must have at least 2 axes. Got shape {w.shape}."
        )
    check_real("the kernel of `base`", w)
    check_adapter(lora, w, "kernel")
    # Packed kernels and adapters store their axes, which `contract` may only repeat.
    geometry = w.geometry if isinstance(w, Kernel) else lora and lora.geometry
    if contract is not None:
        contracting = Geometry.contracting(contract, w.shape)
        if geometry is not None and geometry.roles(w.ndim) != contracting.roles(w.ndim):
            raise ValueError(
                f"`contract` must be left out, or fit the kernel's axes "
                f"{geometry.roles(w.ndim)!r} (b batch, k contracted, n output). Got "
                f"{contract!r}."
            )
        geometry = contracting
    elif geometry is None and name == "weight":
        raise ValueError(UNKNOWN_AXES)
    return as_kernel(w, geometry)
