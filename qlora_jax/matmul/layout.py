"""Where the operands of a product lie on a mesh, and what each device does.

Weights stay where they are, split over their outputs (column-parallel: nothing moves)
or over what is contracted (row-parallel: one all-reduce). If rows of `x` are split over
the same mesh axes (FSDP), each device gathers the weights, packed: codes and scales in
one all-gather of bytes.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32, UInt8

from .._jax.pytree import take_layer
from .backends.reference import Weights


@dataclass(frozen=True)
class Call:
    """What is static about a product of `x [*batch, *rows, .]`.

    Attributes:
        weights: The packed weights' facts.
        batch: Number of batch axes.
        rows: Number of row axes of x.
        stacked: Whether codes have an axis of layers in front.
        backend: Name of the back end; None to choose one.
        transpose: Whether to multiply by the transposed weights.
        precision: As in `dot_general`.
    """

    weights: Weights
    batch: int
    rows: int
    stacked: bool
    backend: str | None
    transpose: bool
    precision: Any


class Layout(NamedTuple):
    """What each device does, and with which parts.

    Attributes:
        on_one: Takes a function `(call, x, codes, scales, *layer)` and returns what a
            device computes of its parts.
        operands: Specs of x, codes, scales and, for a stack, the layer.
        result: Spec of the result.
    """

    on_one: Callable[[Callable], Callable]
    operands: tuple[PartitionSpec, ...]
    result: PartitionSpec


def lay_out(
    call: Call, sizes: dict, x_spec: Any, codes_spec: Any, scales_shape: tuple
) -> Layout:
    """Decides who multiplies what.

    Args:
        call: The product.
        sizes: Size of each mesh axis.
        x_spec: Where x lies.
        codes_spec: Where the codes lie.
        scales_shape: `[*batch, blocks, N]`.
    """
    x_axes = [_axes(entry) for entry in x_spec]
    w_axes = [_axes(entry) for entry in codes_spec][call.stacked :]
    blocks, n = scales_shape[-2:]
    even = call.weights.k == blocks * call.weights.block_size

    def fits(axes, size):
        return size % math.prod(sizes[a] for a in axes) == 0

    batch, used = [], set()
    for own, others in zip(w_axes[: call.batch], x_axes[: call.batch], strict=True):
        batch.append(_unused(own or others, used))
        used.update(batch[-1])
    stored_k = _unused(w_axes[-2], used)
    stored_n = _unused(w_axes[-1], used | {*stored_k})
    rows = []
    for axes in x_axes[call.batch : -1]:
        rows.append(_unused(axes, used))
        used.update(rows[-1])
    # What is split over axes in use is gathered whole.
    k = () if used.intersection(stored_k) else stored_k
    n_axes = () if used.intersection(stored_n) else stored_n
    if not (stored_n if call.transpose else stored_k):
        # x may come split along what is contracted: whole weights are cut to match.
        spare = _unused(x_axes[-1], used | {*stored_k, *stored_n})
        k, n_axes = (k, spare) if call.transpose else (spare, n_axes)
    # A device multiplies whole blocks, as many as the others do.
    k = k if even and fits(k, blocks) else ()
    n_axes = n_axes if fits(n_axes, n) else ()

    gather_k = stored_k if k != stored_k else ()
    gather_n = stored_n if n_axes != stored_n else ()
    held_k, held_n = gather_k or k, gather_n or n_axes
    scales_k = held_k if even and fits(held_k, blocks) else ()
    contracted, outputs = (n_axes, k) if call.transpose else (k, n_axes)
    own_k = call.weights.k // math.prod(sizes[a] for a in k)
    on_one = dataclasses.replace(
        call,
        weights=dataclasses.replace(call.weights, k=own_k),
        stacked=call.stacked and not (gather_k or gather_n),
    )

    def wrap(compute):
        def run(x, codes, scales, *layer):
            if layer and not on_one.stacked:
                codes = take_layer(codes, layer[0])
                layer = ()
            if gather_n:
                codes, scales = gather_columns(codes, scales, gather_n)
            if gather_k and scales_k:
                codes, scales = gather_rows(codes, scales, gather_k)
            elif gather_k:
                codes = lax.all_gather(codes, gather_k, axis=codes.ndim - 2, tiled=True)
            y = compute(on_one, x, codes, scales, *layer)
            return lax.psum(y, contracted) if contracted else y

        return run

    lead, stack = (*batch, *rows), [()] if call.stacked else []
    operands = (
        _spec(*lead, contracted),
        _spec(*stack, *batch, held_k, held_n),
        _spec(*batch, scales_k, held_n),
        *([_spec()] if call.stacked else []),
    )
    return Layout(wrap, operands, _spec(*lead, outputs))


def _axes(entry: Any) -> tuple:
    """The mesh axes of one entry of a spec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _spec(*axes: tuple) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in axes))


def _unused(axes: tuple, used: set) -> tuple:
    """The axes in front of the first used one: what is left of such a split."""
    taken = [axis in used for axis in axes]
    return axes[: taken.index(True)] if any(taken) else axes


def gather_columns(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: tuple,
) -> tuple[Array, Array]:
    """Gathers both along N, in one all-gather of bytes."""
    rows = codes.shape[-2]
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 1, tiled=True)
    return both[..., :rows, :], _scales_of(both[..., rows:, :])


def gather_rows(
    codes: UInt8[Array, "*batch rows n"],
    scales: Float32[Array, "*batch blocks n"],
    axes: tuple,
) -> tuple[Array, Array]:
    """Gathers both along K, in one all-gather of bytes."""
    *lead, rows, n = codes.shape
    both = jnp.concatenate([codes, _bytes_of(scales)], axis=-2)
    both = lax.all_gather(both, axes, axis=both.ndim - 2)
    whole = lambda a: a.reshape(*lead, -1, n)
    return whole(both[..., :rows, :]), _scales_of(whole(both[..., rows:, :]))


def _bytes_of(scales):
    """Float32 `[..., s, n]` as uint8 `[..., 4 s, n]`."""
    *lead, s, n = scales.shape
    parts = lax.bitcast_convert_type(scales, jnp.uint8)
    return jnp.moveaxis(parts, -1, -2).reshape(*lead, 4 * s, n)


def _scales_of(parts):
    """Inverts `_bytes_of`."""
    *lead, s, n = parts.shape
    parts = jnp.moveaxis(parts.reshape(*lead, s // 4, 4, n), -2, -1)
    return lax.bitcast_convert_type(parts, jnp.float32)
