"""Every product of an input with weights, which are packed or float.

`multiply` describes the product by a `ProductSpec` and finds its mesh. The custom
gradient and the batching rule are here, and `sharded` runs the product on devices.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.lax import PrecisionLike
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .._jax.modes import with_mapped_axis
from .._jax.pytree import take_layer
from ..quant.kernel import PackedInput, Placement
from ..quant.views import product_arrays
from .backends.floats import float_product
from .backends.grouped import SortedRows
from .sharded import compute, find_mesh, in_auto_mode
from .spec import OPERANDS, Name, Operands, ProductSpec, product_spec

Weights = PackedInput | Array


def multiply(
    x: Float[Array, "..."],
    weights: Weights,
    offsets: Int32[Array, " experts_and_1"] | None = None,
    *,
    backend: str | tuple[str, ...] | None = None,
    precision: PrecisionLike = None,
    result: DTypeLike | None = None,
    placement: Placement | None = None,
    weights_move: bool = False,
) -> Array:
    """Returns `x @ w` in the dtype `result`, or else in the dtype of `x`.

    x is `[*batch, *rows, K]`. With `offsets`, x is `[M, K]`, and its rows `offsets[e]`
    to `offsets[e + 1]` are multiplied by expert e of the weights. The product of float
    weights is differentiable in both operands.

    Float experts may have a `placement`, for Auto mesh axes. If x and float weights are
    split differently along K over Explicit mesh axes, x is resharded to match them.
    With `weights_move`, the weights are resharded to match x.
    """
    if isinstance(weights, PackedInput):
        spec = product_spec(weights.q)
        *batch, k, _ = weights.q.matrix_shape[weights.layer is not None :]
    else:
        *batch, k, _ = weights.shape
        spec = ProductSpec(None, x.dtype.name, k, placement=placement)
    is_ragged = offsets is not None
    batch = batch[: len(batch) - is_ragged]
    has_batch = x.ndim > len(batch) and x.shape[: len(batch)] == (*batch,)
    if not has_batch or x.shape[-1] != k:
        expected = ", ".join(map(str, [*batch, "...", k]))
        raise ValueError(f"`x` must have shape [{expected}]. Got {x.shape}.")
    spec = replace(
        spec,
        batch=len(batch),
        backend=backend,
        precision=precision,
        is_ragged=is_ragged,
        result=None if result is None else jnp.dtype(result).name,
    )
    return _product(*find_mesh(spec, x, weights, offsets, weights_move))


# y = x w, so dx = g w^T and dw = x^T g, summed over rows, and likewise for products of
# g (`OPERANDS`). First, g is cast to the dtype of x: autodiff would multiply float32 by
# bfloat16 operands, which is several times slower on devices with bfloat16 matrix
# units. Packed weights are frozen and get no gradient. The backward pass decodes them
# again, so that the float weights of all layers are never in memory at once (QLoRA,
# Dettmers et al. 2023, section 3).
@jax.custom_vjp
def _differentiable_product(
    spec: ProductSpec, left: Array, weights: Weights, offsets: Array | None
) -> Array:
    if not isinstance(weights, PackedInput):
        return _batchable_product(spec, Operands(left, weights, offsets=offsets))
    # `product_arrays` moves codes from host memory. It is called here, so that the
    # backward pass moves them again instead of keeping them.
    arrays = product_arrays(weights.q, weights.layer)
    return _batchable_product(spec, Operands(left, *arrays, offsets))


# Jitted so that products of the same shape are traced once. The custom gradient is
# inside `jit`. With `jit` inside the custom gradient, JAX would mistake constants, such
# as the table of quantized scales, for arguments of the jitted function (in
# Hessian-vector products through a scan).
_product = jax.jit(_differentiable_product)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _ArrayType:
    """The dtype of an operand, and the sharding that its gradient must have."""

    dtype: np.dtype
    sharding: NamedSharding | None


def _type_of(spec: ProductSpec, x: Array) -> _ArrayType:
    sharding = jax.typeof(x).sharding
    has_sharding = spec.is_explicit and not sharding.mesh.empty
    return _ArrayType(x.dtype, sharding if has_sharding else None)


def _product_fwd(
    spec: ProductSpec, left: Array, weights: Weights, offsets: Array | None
) -> tuple[Array, tuple]:
    y = _product(spec, left, weights, offsets)
    kept = None if isinstance(weights, PackedInput) else left
    return y, (spec, kept, _type_of(spec, left), weights, offsets)


def _product_bwd(residuals: tuple, g: Array) -> tuple:
    spec, left, left_type, weights, offsets = residuals
    left_name, right_name = OPERANDS[spec.output]
    arrays = {
        left_name: left,
        right_name: weights,
        spec.output: g.astype(left_type.dtype),
    }

    def gradient(name: Name, array_type: _ArrayType) -> Array:
        operands = [arrays[operand] for operand in OPERANDS[name]]
        d = _product(replace(spec, output=name, result=None), *operands, offsets)
        d = d.astype(array_type.dtype)
        sharding = array_type.sharding
        return d if sharding is None else reshard(d, sharding)

    d_left = gradient(left_name, left_type)
    if isinstance(weights, PackedInput):
        return None, d_left, None, None
    return None, d_left, gradient(right_name, _type_of(spec, weights)), None


_differentiable_product.defvjp(_product_fwd, _product_bwd)


# Under `vmap`, XLA knows neither how to batch a TPU kernel nor, from types, how a mesh
# splits the mapped axis. The rule turns the mapped axis into an axis of the operands.
@custom_vmap
def _batchable_product(spec: ProductSpec, operands: Operands) -> Array:
    return compute(spec, operands)


@_batchable_product.def_vmap
def _batched_product(
    size: int, is_batched: list, spec: ProductSpec, operands: Operands
) -> tuple[Array, bool]:
    mapped = Operands(*is_batched[1])
    if spec.is_ragged:
        return _batched_ragged_product(spec, operands, size, mapped), True
    left, right, scales, layer, _ = operands
    if spec.packing is None and spec.mesh is None:
        # XLA batches products of floats without copying operands that are not mapped.
        axes = 0 if mapped.left else None, 0 if mapped.right else None

        def multiply_floats(left: Array, right: Array) -> Array:
            return float_product(spec, Operands(left, right))

        return jax.vmap(multiply_floats, axes)(left, right), True
    # The mapped axis becomes one more row axis if only x has it, and otherwise one more
    # batch axis.
    is_of_weights = mapped.right or mapped.scales or mapped.layer
    if spec.output != "w" and not is_of_weights:
        operands = operands._replace(left=jnp.moveaxis(left, 0, spec.batch))
        y = _batchable_product(spec, operands)
        return jnp.moveaxis(y, spec.batch, 0), True
    right, layer, right_mapped = _take_mapped_layers(operands, mapped)
    right = with_mapped_axis(size, right, right_mapped)
    if layer is not None:  # the axis of layers comes first
        right = jnp.moveaxis(right, 0, 1)
    left = with_mapped_axis(size, left, mapped.left)
    if scales is not None:
        scales = with_mapped_axis(size, scales, mapped.scales)
    spec = replace(spec, batch=spec.batch + 1)
    return _batchable_product(spec, Operands(left, right, scales, layer)), True


def _batched_ragged_product(
    spec: ProductSpec, operands: Operands, size: int, mapped: Operands
) -> Array:
    # Sorts the rows of all products in the batch by expert, and computes one product.
    if spec.is_explicit:  # types do not show how sorted rows are split

        def run(spec: ProductSpec, operands: Operands) -> Array:
            return _batched_ragged_product(spec, operands, size, mapped)

        return in_auto_mode(run, spec, PartitionSpec())(operands)
    left, _, scales, _, offsets = operands
    assert offsets is not None
    right, layer, right_mapped = _take_mapped_layers(operands, mapped)
    left = with_mapped_axis(size, left, mapped.left)
    offsets = with_mapped_axis(size, offsets, mapped.offsets)
    has_own_experts = bool(right_mapped or spec.output == "w")
    rows = SortedRows.sort(offsets, left.shape[1], has_own_experts)
    if spec.output == "w":
        right = rows.take(with_mapped_axis(size, right, right_mapped))
    elif right_mapped:
        right = right.reshape(-1, *right.shape[2:])
        scales = None if scales is None else scales.reshape(-1, *scales.shape[2:])
    operands = Operands(rows.take(left), right, scales, layer, rows.offsets)
    y = _batchable_product(spec, operands)
    if spec.output == "w":
        return y.reshape(size, -1, *y.shape[1:])
    return rows.put_back(y)


def _take_mapped_layers(
    operands: Operands, mapped: Operands
) -> tuple[Array, Array | None, bool]:
    """Returns the right operand, a layer of it, and whether it has the mapped axis."""
    # Back ends read only one layer of a stack. If the products read different layers,
    # slice them first.
    right, layer = operands.right, operands.layer
    if (
        layer is None
        or not mapped.layer
        and not (mapped.right and operands.offsets is not None)
    ):
        return right, layer, bool(mapped.right)
    axes = 0 if mapped.right else None, 0 if mapped.layer else None
    return jax.vmap(take_layer, axes)(right, layer), None, True
