"""Reads float leaves: transposed, stacked and sharded."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..device_shards import (
    Index,
    checked_cells,
    empty,
    on_devices,
    pieces,
    read,
    sizes_of,
)
from ..named_leaves import NamedLeaf


def fill_float(
    leaf: NamedLeaf,
    struct: jax.ShapeDtypeStruct,
    tensors: Mapping[str, Any],
    done: Callable,
) -> Array:
    """Returns a leaf in float, read from its tensors."""
    axes = leaf.batch_axes

    def make(device: Any, parts: Sequence[Index]) -> Sequence[Array]:
        (part,) = parts
        buffer = empty(device, part, struct.dtype)
        batch = tuple(part[a] for a in axes)
        rest = tuple(i for a, i in enumerate(part) if a not in axes)
        for name, place, check in checked_cells(leaf.tensors, batch):
            # XLA widens 16 bits to 32 faster than NumPy.
            wide = tensors[name].dtype.itemsize == 2 and struct.dtype == jnp.float32
            dtype = tensors[name].dtype if wide else struct.dtype
            for x, how, start in _float_pieces(leaf, tensors[name], rest, dtype):
                starts = list(start)
                for axis, at in sorted(zip(axes, place, strict=True)):
                    starts.insert(axis, at)
                x = jax.device_put(x, device)
                buffer, ok = _write_float(buffer, x, tuple(starts), how, tuple(axes))
                check(ok)
            done(math.prod(sizes_of(rest)))
        return (buffer,)

    return on_devices([struct], make)[0]


def _float_pieces(
    leaf: NamedLeaf, tensor: Any, rest: Index, dtype: Any
) -> Iterator[tuple]:
    """Yields pieces in the file's layout, their transposition and their start."""
    if leaf.geometry is None:
        own = leaf.shape[len(leaf.batch_axes) :]
        if leaf.is_vector or not own:
            x = read(tensor, (), dtype).reshape(own)[rest]
            yield x, None, (0,) * len(own)
            return
        for rows in pieces(rest[0], math.prod(sizes_of(rest[1:]))):
            start = (rows.start - rest[0].start, *(0 for _ in rest[1:]))
            yield read(tensor, (rows, *rest[1:]), dtype), None, start
        return
    # n and k may be several axes each: reads are cut along the first, full in the rest.
    kinds = leaf.geometry.kinds.replace("b", "")
    sizes = [n for a, n in enumerate(leaf.shape) if a not in leaf.batch_axes]
    axes = {kind: [a for a, c in enumerate(kinds) if c == kind] for kind in "kn"}
    inner = {kind: math.prod(sizes[a] for a in axes[kind][1:]) for kind in "kn"}
    first = {kind: rest[axes[kind][0]] if axes[kind] else slice(0, 1) for kind in "kn"}
    k_count = sizes_of((first["k"],))[0]
    k = slice(first["k"].start * inner["k"], first["k"].stop * inner["k"])
    # From [n, k] to the kernel's axes; all but the first of n and of k are then cut.
    order = axes["n"] + axes["k"]
    turn = tuple(order.index(a) for a in range(len(kinds)))
    cuts = tuple(
        (0, -1) if a in (axes["k"][:1] + axes["n"][:1]) else (i.start, i.stop)
        for a, i in enumerate(rest)
    )
    for rows in pieces(first["n"], inner["n"] * k_count * inner["k"]):
        n = slice(rows.start * inner["n"], rows.stop * inner["n"])
        n_shape = (rows.stop - rows.start, *(sizes[a] for a in axes["n"][1:]))
        k_shape = (k_count, *(sizes[a] for a in axes["k"][1:]))
        shape = (n_shape if axes["n"] else ()) + k_shape
        start = [0] * len(kinds)
        if axes["n"]:
            start[axes["n"][0]] = rows.start - first["n"].start
        yield read(tensor, (n, k), dtype), (shape, turn, cuts), tuple(start)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write_float(buffer: Array, x: Array, start: tuple, how: Any, axes: tuple) -> Any:
    is_finite = jnp.isfinite(x).all()
    if how is not None:
        shape, turn, cuts = how
        x = x.reshape(shape).transpose(turn)
        x = x[tuple(slice(a, None if b == -1 else b) for a, b in cuts)]
    x = jnp.expand_dims(x, axes).astype(buffer.dtype)
    return lax.dynamic_update_slice(buffer, x, start), is_finite
