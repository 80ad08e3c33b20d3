"""Adapters that are trained through the packer, to be merged and packed again.

A merged adapter changes most weights by less than half a step of a 4-bit grid, so that
packing the merged weights rounds the change away. This kind of adapter is trained on
the weights as they will be packed: with Q for quantize and then dequantize,

    y = x Q(W + s A B).

Q is a step function, whose derivative is 0 almost everywhere. The straight-through
estimator (Bengio et al. 2013, section 3) takes it as 1. Then A and B have exactly the
gradients of a LoRA, and x has the gradient of a product with the packed weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._jax.modes import call_in_auto_mode, varying_with
from .._jax.specs import AnyMesh, fitting_spec
from ..quant.codes import quantize_blocks
from ..quant.formats import Packing
from ..quant.kernel import Kernel
from ..quant.qtensor import QTensor, axes_of_array
from ..quant.schemes import StoredScales
from ..quant.views import take_rows
from .base import ProductCall, constrained, register_adapter
from .lora import (
    SETTINGS,
    LowRank,
    add_change,
    lora_delta,
    lora_product,
    ragged_lora_product,
)

# The columns that are merged and packed at a time have this size in float32.
TILE_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class MergeAware(LowRank):
    """A LoRA that is trained through the packing of its merged kernel.

    The product of its kernel is `x Q(W + scaling * A B)`, where Q packs the sum and
    decodes it. `init` makes it if the config has `merge_aware`. Beside its unpacked
    kernel the adapter means nothing: `merge` with `requantize` returns the packed
    weights that it was trained for. It has the attributes of a `LoRA`, without dropout,
    and one more.

    Attributes:
        packing: The format in which the sum is packed, which may differ from that of
            the kernel.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, fmt="int8", target_fmt="q4_0",
        ...                         merge_aware=True)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> packed, x = ql.merge(base, lora, requantize=True), jnp.ones((2, 64))
        >>> packed["kernel"].fmt
        'q4_0'
        >>> bool(jnp.allclose(ql.apply(packed, None, x), ql.apply(base, lora, x)))
        True
    """

    packing: Packing

    settings = (*SETTINGS, "packing")
    label = "merge-aware"
    can_be_ragged = True

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        def multiply(x: Array, weights: PyTree) -> Array:
            lora, kernel = weights
            return call.multiply(x, lora.packed(kernel))

        # The backward pass packs the weights again. Otherwise, it would keep the packed
        # weights of all layers.
        frozen = lax.stop_gradient((self, kernel))
        y = jax.checkpoint(multiply)(x, frozen)
        # The change of a LoRA, whose value is removed and whose gradient stays.
        x = lax.stop_gradient(x)
        if call.offsets is None:
            change = lora_product(x, self, call.precision, kernel.placement)
        else:
            change = ragged_lora_product(x, self, kernel, call)
        return add_change(y, _gradient_only(change))

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        w = lax.stop_gradient(self).packed(kernel).dequantize()
        change = kernel.geometry.from_matrix(lora_delta(self))
        return add_change(w, _gradient_only(change))

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        if self.row_role is None:
            return super().lookup(ids, kernel)
        rows = take_rows(lax.stop_gradient(self).packed(kernel), ids)
        change = self._at_rows((ids,))._adapt_rows(jnp.zeros_like(rows), None)
        return add_change(rows, _gradient_only(change))

    def packed(self, kernel: Kernel) -> QTensor:
        """Returns the packed weights that `product` applies.

        They are those of `quantize` for `W + scaling * A B`, rounded to the dtype of
        the kernel. A few columns are packed at a time, so the float sum never exists.

        Args:
            kernel: The frozen kernel.
        """
        kernel = kernel.take().to_device()
        packing = self.packing

        def pack(kernel: Kernel, lora: MergeAware) -> tuple[Array, StoredScales]:
            return _pack_sum(kernel, lora, packing)

        def stored_specs(mesh: AnyMesh) -> PyTree:
            spec = tuple(kernel.geometry.matrix_spec(kernel.spec, kernel.ndim))
            # Shapes alone: Explicit mode would refuse the steps of `pack`.
            arguments = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (kernel, self)
            )
            shapes = jax.eval_shape(pack, *arguments)
            return jax.tree.map(
                lambda x: fitting_spec(
                    mesh, axes_of_array(spec, x.ndim, None), x.shape
                ),
                shapes,
            )

        lora = constrained(self, kernel.placement)
        stored: StoredScales
        codes, stored = call_in_auto_mode(pack, stored_specs, kernel, lora)
        pad = codes.shape[-2] * packing.format.codes_per_byte - kernel.matrix_shape[-2]
        return QTensor(
            codes,
            *stored,
            packing.fmt,
            packing.block_size,
            kernel.dtype.name,
            pad,
            kernel.geometry,
            kernel.placement,
        )


register_adapter(MergeAware)


def _gradient_only(change: Array) -> Array:
    """Returns zeros that have the gradient of `change`."""
    return change - lax.stop_gradient(change)


def _pack_sum(
    kernel: Kernel, lora: MergeAware, packing: Packing
) -> tuple[Array, StoredScales]:
    """Packs `W + scaling * A B` some columns at a time."""
    scheme = packing.scheme
    largest: tuple[Array, ...] = ()
    if scheme.needs_largest:
        # The scale of a block depends on the largest one of the kernel, so all scales
        # are computed before the first code.
        unused = jnp.ones(kernel.matrix_shape[:-2], jnp.float32)

        def compute_scales(w: Array) -> Array:
            return quantize_blocks(w, packing, unused)[1]

        (scales,) = _by_columns(kernel, lora, lambda w: (compute_scales(w),))
        largest = (jnp.max(scales, axis=(-1, -2), initial=0.0),)
    codes, scales = _by_columns(
        kernel, lora, lambda w: quantize_blocks(w, packing, *largest)
    )
    return codes, scheme.encode(scales, *largest)


def _by_columns(
    kernel: Kernel, lora: MergeAware, fn: Callable[[Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Returns `fn(W + scaling * A B)`, computed for some columns at a time.

    `fn` maps `[*batch, K, N]` to arrays `[*batch, rows, N]`, column by column.
    """
    *batch, k, n = kernel.matrix_shape
    # On a mesh, a tile has as many columns of each device: `[..., N]` becomes
    # `[..., devices, N / devices]`, and tiles are cut from the last axis.
    num_parts = _num_column_shards(kernel)
    size = n // num_parts
    num_tiles = max(-(-4 * math.prod(batch) * k * n // TILE_BYTES), 1)
    width = -(-size // num_tiles)
    num_tiles = -(-size // width)
    w = kernel.with_float_scales() if isinstance(kernel, QTensor) else kernel.value
    if not isinstance(w, QTensor):
        w = kernel.geometry.to_matrix(w)

    def add_change_to(w: PyTree, b: Array) -> Array:
        is_packed = isinstance(w, QTensor)
        w = w.dequantize_matrix(jnp.float32) if is_packed else w.astype(jnp.float32)
        return (w + lora_delta(replace(lora, b=b))).astype(kernel.dtype)

    if num_tiles == 1:
        return fn(add_change_to(w, lora.b))

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:-1], num_parts, size)

    def join(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1)

    arrays = (w.codes, w.scales) if isinstance(w, QTensor) else (w,)
    arrays = jax.tree.map(split, (arrays, lora.b))

    def pack_tile(start: Array, arrays: PyTree) -> tuple[Array, ...]:
        def cut(x: Array) -> Array:
            return join(lax.dynamic_slice_in_dim(x, start, width, x.ndim - 1))

        tile, b = jax.tree.map(cut, arrays)
        if isinstance(w, QTensor):
            tile = replace(w, codes=tile[0], scales=tile[1])
        else:
            (tile,) = tile
        results = fn(add_change_to(tile, b))
        return tuple(x.reshape(*x.shape[:-1], num_parts, width) for x in results)

    def add_tile(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
        # The last tile overlaps the one before if the width does not divide the size.
        start = jnp.minimum(i * width, size - width)
        tiles = pack_tile(start, arrays)
        pairs = zip(results, tiles, strict=True)
        return tuple(
            lax.dynamic_update_slice_in_dim(x, tile, start, x.ndim - 1)
            for x, tile in pairs
        )

    shapes = jax.eval_shape(pack_tile, jnp.zeros((), np.int32), arrays)
    empty = (jnp.zeros((*x.shape[:-1], size), x.dtype) for x in shapes)
    results = tuple(varying_with(x, arrays) for x in empty)
    return tuple(map(join, lax.fori_loop(0, num_tiles, add_tile, results)))


def _num_column_shards(kernel: Kernel) -> int:
    """Returns into how many parts a mesh splits the columns, or 1 if it does not."""
    *_, n = kernel.matrix_shape
    if kernel.placement is None:
        return 1
    *_, axes = kernel.placement.matrix_axes(len(kernel.matrix_shape))
    count = math.prod(kernel.placement.mesh.shape[name] for name in axes)
    return count if n % count == 0 else 1
