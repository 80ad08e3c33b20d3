"""Applies one adapted dense layer, or looks up rows of one adapted table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax import lax
from jaxtyping import Array, Int, PyTree

from .._jax.arguments import check_key
from .._jax.modes import split_as
from .._jax.pytree import TreeLeaf, unbox
from ..product.choose import as_backends
from ..product.matmul import as_float
from ..quant.geometry import UNKNOWN_AXES, Contract, Geometry
from ..quant.kernel import Kernel, as_kernel
from .base import AdaptedKernel, Adapter, check_adapter
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
    # 1. Find the kernel, the bias and their adapters.
    layer = _parts("base", base, "kernel")
    name = next((name for name in BIAS_NAMES if name in layer), "kernel")
    adapters = _parts("lora", lora, name)
    _check_parts(layer, adapters, name)
    bias, bias_lora = (parts.get(BIAS_NAMES[name]) for parts in (layer, adapters))
    if bias_lora is not None:
        check_adapter(bias_lora, bias, "bias")
        if bias_lora.replacement is None:
            raise ValueError(
                f"the adapter of a bias must be a Trained. Got {bias_lora!r}."
            )
        bias = bias_lora.merged(as_kernel(bias))
    kernel_lora = adapters.get(name)
    kernel = _checked_kernel(name, layer[name], kernel_lora, contract)
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


def _parts(argument: str, node: PyTree, leaf_name: str) -> dict[str, PyTree]:
    """Returns the parts of a layer by name. A leaf is the part called `leaf_name`."""
    node = unbox(node)
    if node is None:
        return {}
    if isinstance(node, TreeLeaf) or hasattr(node, "shape"):
        return {leaf_name: node}
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


def _check_parts(
    layer: dict[str, PyTree], adapters: dict[str, PyTree], name: str
) -> None:
    """Raises ValueError unless a layer and its adapters are a kernel and a bias."""
    allowed = {name, BIAS_NAMES[name]}
    if {"codes", "scales"} <= set(layer):
        raise ValueError(
            "`base` must have a kernel. Got the arrays of a QTensor, from a tree that "
            "was restored without its structure. Use ql.QTensor.from_parts."
        )
    if name not in layer or not set(layer) <= allowed:
        raise ValueError(
            "`base` must have a 'kernel' (or 'weight', 'w') and at most a 'bias' (or "
            f"'b'). Got {sorted(layer)}."
        )
    if not set(adapters) <= allowed:
        raise ValueError(
            f"`lora` must be one layer's adapters: at most those of {sorted(allowed)}. "
            f"Got {sorted(adapters)}."
        )


def _checked_kernel(
    name: str, w: PyTree, lora: Adapter | None, contract: Contract | None
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
    geometry = w.geometry if isinstance(w, Kernel) else None
    if geometry is None and lora is not None and lora.replacement is None:
        geometry = lora.geometry
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
