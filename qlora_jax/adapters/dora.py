"""DoRA (Liu et al. 2024): LoRA with a trained magnitude for each output."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, PyTree

from .._jax.modes import is_local, split_as, varying_with
from ..product.floats import float_product
from ..quant.kernel import Kernel
from ..quant.qtensor import QTensor
from .base import (
    ProductCall,
    constrained,
    frozen_product,
    on_matrix,
    register_adapter,
)
from .lora import (
    LowRank,
    apply_dropout,
    cast,
    lora_delta,
    lora_product,
    scaled,
)

# The columns, or rows of a table, that are decoded at a time have this size in float32.
TILE_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class DoRA(LowRank):
    """A LoRA that trains the magnitude of each output apart from its direction.

    The product of its kernel is `(x W + scaling * (x A) B) * m / c`, where c are the
    norms of the columns of `W + scaling * A B`, without a gradient (DoRA, Liu et al.
    2024, section 4). `init` makes it if the config has `use_dora`. It has the
    attributes of a `LoRA`, and one more.

    Attributes:
        m: The magnitudes, `[*batch, N]`. They start as the norms of the columns of the
            packed W.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> config = ql.QLoRAConfig(rank=4, use_dora=True)
        >>> base, lora = ql.init(jax.random.key(0), params, config)
        >>> lora["kernel"].m.shape, float(lora["kernel"].m[0])
        ((8,), 8.0)
    """

    m: Array

    roles = {**LowRank.roles, "m": "n"}
    label = "dora"

    def product(self, x: Array, kernel: Kernel, call: ProductCall) -> Array:  # noqa: D102
        # y = x V * m / c, with V = W + scaling * A B (equation 5) and c the norms of
        # its columns, which get no gradient (section 4.3). As in PEFT, dropout does not
        # act on the frozen product x W, but only on the adapter's change of it: with d,
        # the input after dropout, y = x W + (d V * m / c - d W).
        d = apply_dropout(x, self.dropout, call.dropout_key)
        frozen = frozen_product(d, kernel, call)
        norms = column_norms(self, kernel, call, x.dtype)
        scale = split_as(self.m.astype(jnp.float32), norms) / norms
        # [*batch, N] -> [*batch, 1, ..., N], to broadcast over the rows of y.
        scale = jnp.expand_dims(scale, tuple(range(scale.ndim - 1, frozen.ndim - 1)))
        change = lora_product(d, self, kernel, call.precision)
        y = frozen + split_as(change.astype(frozen.dtype), frozen)
        # Named because the gradient of m needs d V: a `jax.checkpoint` policy that does
        # not save it would compute both products again.
        y = checkpoint_name(y, "dora_product").astype(jnp.float32)
        y = (y * split_as(scale, y)).astype(x.dtype)
        return y if d is x else y + (frozen_product(x, kernel, call) - frozen)

    def merged(self, kernel: Kernel) -> Float[Array, "..."]:  # noqa: D102
        def adapt(w: Array, delta: Array, m: Array) -> Array:
            v = w + delta
            norms = _safe_sqrt(jnp.sum(jnp.square(lax.stop_gradient(v)), -2))
            return v * (m.astype(jnp.float32) / norms)[..., None, :]

        lora = constrained(self, kernel)
        return on_matrix(kernel, adapt, lora_delta(lora), lora.m)


register_adapter(DoRA)


def column_norms(
    lora: LowRank,
    kernel: Kernel,
    call: ProductCall,
    dtype: DTypeLike,
) -> Float32[Array, "*batch n"]:
    """Returns the norms of the columns of `W + scaling * A B`, without a gradient.

    The product with W is computed in `dtype`, the dtype of the input.
    """
    # V = W + s A B is as large as the float kernel, so it is not computed. Instead,
    #   c^2 = |W[:, n]|^2 + s sum_r B[r, n] (2 (A^T W)[r, n] + s (A^T A B)[r, n])
    # for column n, where A^T W is a product of r rows with the packed kernel.
    kernel = lax.stop_gradient(_without_row_axes(kernel))
    lora = constrained(lax.stop_gradient(lora), kernel)
    a, b = cast(lora.a, dtype), cast(lora.b, dtype).astype(jnp.float32)
    at_w = frozen_product(a.swapaxes(-1, -2), kernel, call).astype(
        jnp.float32
    )  # [*batch, r, N]
    a, exact = a.astype(jnp.float32), lax.Precision.HIGHEST
    gram = float_product(a.swapaxes(-1, -2), a, exact)  # [*batch, r, r]
    at_ab = float_product(gram, b, exact)  # [*batch, r, N]
    inner = 2 * at_w + split_as(scaled(at_ab, lora), at_w)
    change = jnp.sum(split_as(b, at_w) * inner, -2)
    squares = split_as(_column_squares(kernel), change)
    # If the adapter cancels a column of W, rounding may make the sum negative.
    norms = _safe_sqrt(jnp.maximum(squares + scaled(change, lora), 1e-7 * squares))
    return checkpoint_name(norms, "dora_norms")


def _column_squares(kernel: Kernel) -> Float32[Array, "*batch n"]:
    # The sums are computed in each call. If they were stored among the trained arrays,
    # an optimizer would change them; with the packed kernel, they could become stale.
    q = kernel.take().to_device()  # `take` copies one layer out of its stack
    if not isinstance(q, QTensor) or not is_local():
        return jnp.sum(jnp.square(q.dequantize_matrix(jnp.float32)), -2)
    # XLA on CPUs does not fuse decoding with the sum, so a few columns are decoded at a
    # time. The last tile overlaps the previous one if the width does not divide N.
    *batch, _, n = q.matrix_shape
    num_tiles = max(math.ceil(4 * q.size / TILE_BYTES), 1)
    width = -(-n // num_tiles)
    plain = q.with_float_scales()

    def add_tile(i: Array, sums: Array) -> Array:
        start = jnp.minimum(i * width, n - width)
        codes, scales = (
            lax.dynamic_slice_in_dim(x, start, width, x.ndim - 1)
            for x in (plain.codes, plain.scales)
        )
        tile = replace(plain, codes=codes, scales=scales)
        tile_sums = jnp.sum(jnp.square(tile.dequantize_matrix(jnp.float32)), -2)
        return lax.dynamic_update_slice_in_dim(sums, tile_sums, start, sums.ndim - 1)

    sums = varying_with(jnp.zeros((*batch, n), jnp.float32), q)
    return lax.fori_loop(0, num_tiles, add_tile, sums)


def _without_row_axes(kernel: Kernel) -> Kernel:
    # If a placement has mesh axes of rows (FSDP), products gather the weights over
    # these axes, because they split the rows of x as well. A product with A^T, whose
    # rows are not split, needs no gather.
    if kernel.placement is None:
        return kernel
    placement = replace(kernel.placement, rows=())

    def replace_placement(node: PyTree) -> PyTree:
        is_packed = isinstance(node, QTensor)
        return replace(node, placement=placement) if is_packed else node

    # The packed kernel may be inside another one, such as a `LayerOfStack`.
    return jax.tree.map(
        replace_placement, kernel, is_leaf=lambda node: isinstance(node, QTensor)
    )


def _safe_sqrt(squares: Array) -> Array:
    """Returns positive square roots, so that columns of zeros stay zero."""
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))
