"""Adapters that are trained through the packer, to be merged and packed again.

A merged adapter changes most weights by less than half a step of a 4-bit grid, so that
packing the merged weights rounds the change away. This kind of adapter is trained on
the weights as they will be packed: with Q for quantize and then dequantize,

    y = x Q(W + s A B).

Q is a step function, whose derivative is 0 almost everywhere. The straight-through
estimator (Bengio et al. 2013, section 3) takes it as 1. Then A and B have exactly the
gradients of a LoRA, and x has the gradient of a product with the packed weights.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float, PyTree

from .._jax.modes import (
    axes_of_type,
    call_in_auto_mode,
    explicit_axes,
    explicit_mesh,
    split_as,
    split_by,
    varying_with,
)
from .._jax.specs import (
    AnyMesh,
    Axes,
    axes_of,
    fitting,
    fitting_spec,
    make_spec,
    spec_of,
)
from ..product.sharded import declared_mesh
from ..quant.codes import quantize_blocks
from ..quant.formats import Packing
from ..quant.geometry import to_matrix
from ..quant.kernel import Kernel
from ..quant.qtensor import QTensor, axes_of_array
from ..quant.schemes import StoredScales
from ..quant.search import ScaleRule
from ..quant.views import take_rows
from .base import ProductCall, register_adapter
from .lora import (
    SETTINGS,
    LowRank,
    add_change,
    lora_delta,
    lora_product,
    ragged_lora_product,
    scaled,
)

# The columns that are merged and packed at a time have this size in float32.
TILE_BYTES = 2**20


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
        scales: How the scales of the sum are chosen, as in `quantize`.

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
    scales: ScaleRule = "absmax"

    settings = (*SETTINGS, "packing", "scales")
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
        settings = call.precision, kernel.placement
        return _with_gradients(settings, y, x, self, call.offsets)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        w = lax.stop_gradient(self).packed(kernel).dequantize()
        change = kernel.geometry.from_matrix(lora_delta(self))
        return add_change(w, change - lax.stop_gradient(change))

    def lookup(self, ids: Array, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        if self.row_role is None:
            return super().lookup(ids, kernel)
        rows = take_rows(lax.stop_gradient(self).packed(kernel), ids)
        change = self._at_rows((ids,))._adapt_rows(jnp.zeros_like(rows), None)
        return add_change(rows, change - lax.stop_gradient(change))

    def packed(self, kernel: Kernel) -> QTensor:
        """Returns the packed weights that `product` applies.

        They are those of `quantize` for `W + scaling * A B`, rounded to the dtype of
        the kernel. A few columns are packed at a time, so the float sum never exists.

        Args:
            kernel: The frozen kernel.
        """
        kernel, packing = kernel.take().to_device(), self.packing
        columns, largest = _Columns.of(kernel, self), ()
        if packing.scheme.needs_largest:
            # The code of a weight depends on the largest scale of its kernel, so all
            # scales are computed before the first code.
            ones = jnp.ones(kernel.matrix_shape[:-2], jnp.float32)
            (scales,) = columns.map(lambda w: quantize_blocks(w, packing, ones)[1:])
            largest = (jnp.max(scales, axis=(-1, -2), initial=0.0),)
        codes, scales = columns.map(
            lambda w, *largest: quantize_blocks(
                w, packing, *largest, scales=self.scales
            ),
            *largest,
        )

        def encode(scales: Array, *largest: Array) -> StoredScales:
            return packing.scheme.encode(scales, *largest)

        def stored_specs(mesh: AnyMesh) -> PyTree:
            struct = jax.ShapeDtypeStruct
            shapes = [struct(x.shape, x.dtype) for x in (scales, *largest)]
            return jax.tree.map(
                lambda x: fitting_spec(
                    mesh, axes_of_array(spec_of(codes), x.ndim, None), x.shape
                ),
                jax.eval_shape(encode, *shapes),
            )

        stored: StoredScales = call_in_auto_mode(encode, stored_specs, scales, *largest)
        pad = codes.shape[-2] * packing.format.codes_per_byte - kernel.matrix_shape[-2]
        settings = packing.fmt, packing.block_size, kernel.dtype.name, pad
        return QTensor(codes, *stored, *settings, kernel.geometry, kernel.placement)


register_adapter(MergeAware)


# Returns y, whose gradient is passed to A and B as if y were the product of a LoRA. The
# gradient of x comes from the product with the packed weights.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients(
    settings: tuple, y: Array, x: Array, lora: MergeAware, offsets: Array | None
) -> Array:
    return y


def _with_gradients_fwd(
    settings: tuple, y: Array, x: Array, lora: MergeAware, offsets: Array | None
) -> tuple[Array, tuple]:
    return y, (x, lora, offsets)


def _with_gradients_bwd(settings: tuple, residuals: tuple, dy: Array) -> tuple:
    x, lora, offsets = residuals
    precision, placement = settings

    def change(lora: MergeAware) -> Array:
        if offsets is None:
            product = lora_product(x, lora, precision, placement)
        else:
            product = ragged_lora_product(x, lora, offsets, precision, placement)
        return split_as(product.astype(dy.dtype), dy)

    # The change itself is not used, so XLA does not compute it.
    _, vjp = jax.vjp(change, lora)
    return dy, None, *vjp(dy), None


_with_gradients.defvjp(_with_gradients_fwd, _with_gradients_bwd)


@dataclass(frozen=True, eq=False)
class _Columns:
    """The columns of `W + scaling * A B`, which are computed a few at a time."""

    weights: tuple[Array, ...]  # codes and float scales, or float weights
    a: Float[Array, "*batch k r"]
    b: Float[Array, "*batch r n"]  # multiplied by the scaling
    # Maps weights to float32 `[*batch, K, N]`, rounded to the kernel's dtype.
    decode: Callable[..., Array]
    dtype: np.dtype
    mesh: AnyMesh | None
    axes: list[Axes]  # the mesh axes of `[*batch, K, N]`

    @classmethod
    def of(cls, kernel: Kernel, lora: MergeAware) -> "_Columns":
        if isinstance(kernel, QTensor):
            q = kernel.with_float_scales()
            weights = q.codes, q.scales

            def decode(codes: Array, scales: Array) -> Array:
                tile = replace(q, codes=codes, scales=scales)
                return tile.dequantize_matrix(jnp.float32)
        else:
            weights = (to_matrix(kernel.geometry, kernel.value),)

            def decode(w: Array) -> Array:
                return w.astype(jnp.float32)

        a, b = lora.a.astype(jnp.float32), scaled(lora.b.astype(jnp.float32), lora)
        mesh, axes = _matrix_axes(kernel)
        if mesh is not None:
            # A device needs all rows of a block, in the base's format and in the new.
            rows = [w.shape[-2] for w in weights]
            rows.append(kernel.matrix_shape[-2] // lora.packing.block_size)
            axes[-2] = fitting(axes[-2], mesh.shape, *rows)
            axes[-1] = fitting(axes[-1], mesh.shape, b.shape[-1])
        return cls(weights, a, b, decode, kernel.dtype, mesh, axes)

    def map(self, fn: Callable[..., tuple[Array, ...]], *extra: Array) -> tuple:
        """Returns `fn(columns, *extra)` for all columns.

        `fn` maps `[*batch, K, n]` to arrays `[*batch, rows, n]`, column by column, and
        `extra` are arrays `[*batch]`.
        """
        run = functools.partial(self._map_on_device, fn)
        operands = (self.weights, self.a, self.b, *extra)
        if self.mesh is None:
            return run(*operands)
        *batch, k, n = self.axes
        matrix = make_spec(*batch, k, n)
        specs = [tuple(matrix for _ in self.weights), make_spec(*batch, k, ())]
        specs += [make_spec(*batch, (), n), *(make_spec(*batch) for _ in extra)]
        names = axes_of_type(self.mesh, AxisType.Auto)
        if explicit_mesh(operands) is not None:
            names = explicit_axes(self.mesh)
            mesh = self.mesh
            operands = jax.tree.map(
                lambda x, spec: split_by(x, mesh, spec), operands, tuple(specs)
            )
        return jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=tuple(specs),
            out_specs=matrix,
            axis_names={*names},
            check_vma=False,
        )(*operands)

    def _map_on_device(self, fn, weights, a, b, *extra) -> tuple[Array, ...]:
        *batch, k, n = (*a.shape[:-1], b.shape[-1])
        num_tiles = max(-(-4 * math.prod(batch) * k * n // TILE_BYTES), 2)
        width = -(-n // num_tiles)

        def compute_tile(start: Array | int, width: int) -> tuple[Array, ...]:
            def cut(x: Array) -> Array:
                return lax.dynamic_slice_in_dim(x, start, width, x.ndim - 1)

            columns = self.decode(*map(cut, weights))
            change = jnp.matmul(a, cut(b), precision=lax.Precision.HIGHEST)
            return fn((columns + change).astype(self.dtype), *extra)

        if width == n:
            return compute_tile(0, n)

        def add_tile(i: Array, results: tuple[Array, ...]) -> tuple[Array, ...]:
            # The last tile overlaps the one before if the width does not divide N.
            start = jnp.minimum(i * width, n - width)
            tiles = compute_tile(start, width)
            return tuple(
                lax.dynamic_update_slice_in_dim(x, tile, start, x.ndim - 1)
                for x, tile in zip(results, tiles, strict=True)
            )

        shapes = jax.eval_shape(lambda: compute_tile(0, width))
        results = (jnp.zeros((*x.shape[:-1], n), x.dtype) for x in shapes)
        results = tuple(varying_with(x, weights, a, b) for x in results)
        return lax.fori_loop(0, -(-n // width), add_tile, results)


def _matrix_axes(kernel: Kernel) -> tuple[AnyMesh | None, list[Axes]]:
    """Returns the mesh of a kernel, and the mesh axes of its `[*batch, K, N]`."""
    if (mesh := explicit_mesh(kernel)) is not None:
        spec = kernel.geometry.matrix_spec(kernel.spec, kernel.ndim)
        return mesh, [axes_of(entry) for entry in spec]
    mesh = declared_mesh(kernel.placement)
    if mesh is None or kernel.placement is None:
        return None, []
    auto = axes_of_type(mesh, AxisType.Auto)
    axes = kernel.placement.matrix_axes(len(kernel.matrix_shape))
    return mesh, [tuple(name for name in entry if name in auto) for entry in axes]
