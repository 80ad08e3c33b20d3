"""Adapters whose forward pass uses the merged weights after they have been packed.

An ordinary adapter changes most weights by less than half a step of a 4-bit grid. If it
is merged and the sum is packed, rounding removes most of these changes. A merge-aware
adapter is trained with the rounded weights instead. Its product is

    y = x Q(W + s A B),

where Q quantizes the sum and dequantizes it again.

Q is a step function, whose derivative is 0 almost everywhere. The straight-through
estimator (Bengio et al. 2013, section 3) uses 1 in its place. A and B then get exactly
the gradients of a LoRA, and x gets the gradient of a product with the packed weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float, PyTree

from .._jax.arguments import unwrap_operands
from .._jax.modes import (
    auto_only,
    axes_of_type,
    call_in_auto_mode,
    explicit_mesh,
    split_as,
    split_by,
    unmapped_explicit_axes,
)
from .._jax.specs import AnyMesh, Axes, axes_of, dividing_prefix, make_spec, spec_of
from ..quant.codes import dequantize_blocks, quantize_blocks
from ..quant.formats import FORMATS, Format, Packing
from ..quant.geometry import to_matrix
from ..quant.kernel import Kernel, declared_mesh
from ..quant.pack import straight_through
from ..quant.qtensor import QTensor, round_to, stored_specs
from ..quant.schemes import StoredScales, next_power_of_two
from .base import Adapter, ProductCall, frozen_product, register_adapter
from .lora import SETTINGS, LowRank, lora_product

# The kernel is merged and packed one tile at a time. A tile has a few rows and all
# columns. In float32, it has at most this many bytes, so that it fits into the cache of
# a processor. It is larger only if the rows of one block already are.
TILE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class MergeAware(LowRank):
    """A LoRA that is trained through the packing of its merged kernel.

    Its product is `x Q(W + scaling * A B)`, where Q packs the sum and decodes it.
    `init` makes adapters of this kind if the config has `merge_aware`. The adapter is
    of no use as a LoRA beside the kernel W: the result of training is the packed
    weights, which `merge` with `requantize` returns. It has the attributes of a `LoRA`,
    with a dropout of 0, and the one below.

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
        # The call is a static argument of `_packed_product`, so arrays are operands.
        static_call = call._replace(dropout_key=None, offsets=None)
        return _packed_product(static_call, x, self, kernel, call.offsets)

    def _settings_misfit(self, batch: Sequence[int], k: int) -> str | None:
        try:
            self.packing.check_rows(k)
        except ValueError as error:
            return str(error)
        return super()._settings_misfit(batch, k)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        frozen, frozen_kernel = lax.stop_gradient((self, kernel))
        w = frozen.packed(frozen_kernel).dequantize()
        return straight_through(super().merged(kernel), w)

    def packed(self, kernel: Kernel) -> QTensor:
        """Returns the packed weights that `product` applies.

        They are what `quantize` returns for `W + scaling * A B`, after this sum has
        been rounded to the dtype of the kernel. Only in nvfp4, the divisor of all
        scales differs: it is computed from the largest weight, rounded up to a power of
        two. A few rows are packed at a time, so that the whole sum is never in memory.

        Args:
            kernel: The frozen kernel.
        """
        kernel, packing = kernel.take().to_device(), self.packing
        tiles = _Tiles.of(kernel, self)
        largest = ()  # the largest scale, in formats that use it
        if packing.scheme.uses_largest:
            # The code of a weight depends on the largest scale of its kernel, so a
            # first pass over the tiles computes all scales. The scales themselves do
            # not depend on the largest scale, so this pass uses ones in its place.
            ones = jnp.ones(kernel.matrix_shape[:-2], jnp.float32)
            (scales,) = tiles.map(
                lambda w, largest: quantize_blocks(w, packing, largest)[1:], ones
            )
            # With a power of two, `merge` can give a common divisor to the kernels that
            # a server fuses, without changing values.
            largest = (next_power_of_two(jnp.max(scales, (-1, -2), initial=0.0)),)
        codes, scales = tiles.map(
            lambda w, *largest: quantize_blocks(w, packing, *largest), *largest
        )
        encode = packing.scheme.encode

        def specs(mesh: AnyMesh) -> PyTree:
            return stored_specs(mesh, spec_of(codes), encode, scales, *largest)

        stored: StoredScales = call_in_auto_mode(encode, specs, scales, *largest)
        settings = packing.fmt, packing.block_size, kernel.dtype.name
        return QTensor(codes, *stored, *settings, kernel.geometry, kernel.placement)


register_adapter(MergeAware)


def is_merge_aware(adapter: Adapter | None) -> TypeGuard[MergeAware]:
    """Whether an adapter was trained for the packed sum with its kernel."""
    return isinstance(adapter, MergeAware)


# Computes y = x Q(M) with M = W + s A B. The gradients use 1 as the derivative of Q,
# which is the straight-through estimator. The gradient of x is dy Q(M)^T. Those of A
# and B are the ones of a LoRA, s x^T (dy B^T) and s (x A)^T dy, so no gradient is as
# large as the kernel. The backward pass computes Q(M) again. If Q(M) were a residual
# instead, the packed weights of all layers would be in memory at once. The only
# residuals are the operands, which a scan does not copy.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_product(
    call: ProductCall,
    x: Array,
    lora: MergeAware,
    kernel: Kernel,
    offsets: Array | None,
) -> Array:
    return frozen_product(x, lora.packed(kernel), call._replace(offsets=offsets))


def _packed_product_fwd(call: ProductCall, *operands: PyTree) -> tuple[Array, tuple]:
    _, _, kernel, _ = operands
    arrays = unwrap_operands(
        operands,
        kernel,
        "the kernel of a merge-aware adapter must be frozen, because it gets no "
        "gradient. Got one that is differentiated. Differentiate with respect to the "
        "adapters, or pass `jax.lax.stop_gradient(base)`.",
    )
    return _packed_product(call, *arrays), arrays


def _packed_product_bwd(call: ProductCall, operands: tuple, dy: Array) -> tuple:
    x, lora, kernel, offsets = operands

    def change(x: Array, lora: MergeAware) -> Array:
        product = lora_product(x, lora, kernel, call.precision, offsets)
        return split_as(product.astype(dy.dtype), dy)

    packed = lax.stop_gradient(lora).packed(lax.stop_gradient(kernel))
    # `jax.vjp` also returns the products. They are not used, so XLA drops them.
    call = call._replace(offsets=offsets)
    _, multiply_vjp = jax.vjp(lambda x: frozen_product(x, packed, call), x)
    _, change_vjp = jax.vjp(change, x, lora)
    # The value of dx is dy Q(M)^T. For second derivatives, the derivative of Q is again
    # replaced by 1: dx is differentiated with respect to A and B as if it were
    # dy (W + s A B)^T, of which `dx_by_change` is the part with A and B.
    dx_by_change, _ = change_vjp(lax.stop_gradient(dy))
    (dx_packed,) = multiply_vjp(dy)
    _, dlora = change_vjp(dy)
    return straight_through(dx_by_change, dx_packed), dlora, None, None


_packed_product.defvjp(_packed_product_fwd, _packed_product_bwd, symbolic_zeros=True)


@dataclass(frozen=True, eq=False)
class _Tiles:
    """The sum `W + scaling * A B`, which is computed in tiles of a few rows."""

    weights: tuple[Array, ...]  # codes and float32 scales, or float weights
    fmt: Format | None  # of packed weights
    a: Float[Array, "*batch k r"]
    b: Float[Array, "*batch r n"]
    scaling: float
    dtype: np.dtype  # of the kernel
    block_rows: int  # the number of rows of a tile, and K, are multiples of this
    mesh: AnyMesh | None
    axes: list[Axes]  # the mesh axes of `[*batch, K, N]`

    @classmethod
    def of(cls, kernel: Kernel, lora: MergeAware) -> "_Tiles":
        if isinstance(kernel, QTensor):
            q = kernel.with_float_scales()
            weights, fmt = (q.codes, q.scales), FORMATS[q.fmt]
            block_rows = max(q.block_size, lora.packing.block_size)
        else:
            weights, fmt = (to_matrix(kernel.geometry, kernel.value),), None
            block_rows = lora.packing.block_size
        a, b = lora.a.astype(jnp.float32), lora.b.astype(jnp.float32)
        *_, k, n = kernel.matrix_shape
        mesh, axes = _matrix_axes(kernel)
        if mesh is not None:
            # Split K only where each device gets whole blocks of both formats.
            axes[-2] = dividing_prefix(axes[-2], mesh.shape, k // block_rows)
            axes[-1] = dividing_prefix(axes[-1], mesh.shape, n)
        arrays = weights, fmt, a, b, lora.scaling
        return cls(*arrays, kernel.dtype, block_rows, mesh, axes)

    def map(self, fn: Callable[..., tuple[Array, ...]], *extra: Array) -> tuple:
        """Calls `fn(rows, *extra)` for each tile, and joins the results along the rows.

        `fn` gets some rows `[k, N]` of one matrix, and returns arrays `[entries, N]`.
        It must treat each block of rows on its own. `extra` are arrays `[*batch]`, of
        which `fn` gets the numbers for its matrix.
        """
        run, mesh = functools.partial(self._map_on_device, fn), self.mesh
        operands: tuple[Any, ...] = self.weights, self.a, self.b, *extra
        if mesh is None:
            return run(*operands)
        *batch, k, n = self.axes
        matrix_spec, batch_spec = make_spec(*batch, k, n), make_spec(*batch)
        a_spec, b_spec = make_spec(*batch, k, ()), make_spec(*batch, (), n)
        extra_specs = [batch_spec] * len(extra)
        in_specs = (matrix_spec,) * len(self.weights), a_spec, b_spec, *extra_specs
        axis_names = axes_of_type(mesh, AxisType.Auto)
        if explicit_mesh(operands) is not None:
            axis_names = unmapped_explicit_axes(mesh)
            operands = jax.tree.map(
                lambda x, spec: split_by(x, mesh, spec), operands, in_specs
            )
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=matrix_spec,
            axis_names={*axis_names},
            check_vma=False,
        )(*operands)

    def _map_on_device(
        self, fn: Callable, weights: tuple, a: Array, b: Array, *per_matrix: Array
    ) -> tuple[Array, ...]:
        # `per_matrix` are the `extra` arrays of `map`, [*batch].
        *batch, k, _ = a.shape
        tile_rows = rows_of_tile(k, b.shape[-1], self.block_rows)
        num_tiles = k // tile_rows

        def map_matrix(operands: tuple) -> tuple[Array, ...]:
            weights, a, b, *extra = operands

            def merge(arrays: list[Array]) -> Array:
                *weights, a = arrays
                change = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
                change *= self.scaling
                w = self._decode(weights) + change
                # Round to the dtype of the kernel, as `merge` of a LoRA does.
                return round_to(w, self.dtype, jnp.float32)

            def pack_tile(tile: list[Array]) -> tuple[Array, ...]:
                # Compute the sum in a loop over the two halves of the tile. XLA on CPUs
                # does not fuse a loop with other code. Without the loop, it would fuse
                # the sum into `fn`, and compute it again for each result of `fn`, in
                # slow scalar code.
                halves = [x.reshape(2, x.shape[0] // 2, -1) for x in tile]
                w = lax.map(merge, halves)
                return fn(w.reshape(tile_rows, -1), *extra)

            tiles = [x.reshape(num_tiles, -1, x.shape[-1]) for x in (*weights, a)]
            if self.fmt is not None:
                # `pack_tile` splits a tile into halves. If a tile has an odd number of
                # blocks, this splits a block, so repeat every scale: each half of a
                # block then has one, as `_decode` expects.
                tiles[1] = jnp.repeat(tiles[1], 2, axis=1)
            packed = lax.map(pack_tile, tiles)
            return tuple(x.reshape(-1, x.shape[-1]) for x in packed)

        map_stack = map_matrix
        for _ in batch:
            map_stack = functools.partial(lax.map, map_stack)
        return map_stack((weights, a, b, *per_matrix))

    def _decode(self, weights: list[Array]) -> Array:
        """Returns float32 rows from their codes and scales, or from float weights.

        Each row of the scales is for half a block.
        """
        if self.fmt is None:
            return weights[0].astype(jnp.float32)
        codes, scales = weights
        w = dequantize_blocks(codes, scales, self.fmt)
        return round_to(w, self.dtype, jnp.float32)


def rows_of_tile(k: int, n: int, block_rows: int) -> int:
    """Returns the number of rows of a tile, a multiple of `block_rows`."""
    num_blocks, block_bytes = k // block_rows, 4 * block_rows * max(n, 1)
    # Use at least two tiles, if there are two blocks. With a single tile, there is no
    # loop. XLA on CPUs then fuses packing with the decoding in the product that
    # follows, which gives slow scalar code.
    limit = max(1, min(TILE_BYTES // block_bytes, num_blocks // 2))  # in blocks
    return block_rows * next(i for i in range(limit, 0, -1) if num_blocks % i == 0)


def _matrix_axes(kernel: Kernel) -> tuple[AnyMesh | None, list[Axes]]:
    """Returns the mesh of a kernel, and the mesh axes of its `[*batch, K, N]`."""
    if (mesh := explicit_mesh(kernel)) is not None:
        spec = kernel.geometry.matrix_spec(kernel.spec, kernel.ndim)
        return mesh, [axes_of(entry) for entry in spec]
    mesh = declared_mesh(kernel.placement)
    if mesh is None or kernel.placement is None:
        return None, []
    axes = kernel.placement.matrix_axes(len(kernel.matrix_shape))
    return mesh, auto_only(mesh, axes)
