"""Sharding constraints for the activations of a decoder on an ambient mesh.

By itself, XLA would neither exchange embedded tokens by an all-to-all nor split a tied
head along the vocabulary, and it cannot partition a kernel of attention.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

ROW_AXES = ("data", "fsdp")
MESH_AXES = (*ROW_AXES, "tensor")


def split_embedded(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Splits embedded tokens by rows, in the same way as the batch."""
    # The embedding is split along D, so the look-up gives each device some columns of
    # all rows. Exchange them, so that each device has all columns of some rows. Without
    # these constraints, an all-reduce would give every device all columns of all rows.
    sizes = _auto_axes()
    rows = select_axes(ROW_AXES, sizes)
    if not rows or x.shape[0] % _num_parts(rows, sizes):
        return x
    columns = select_axes(("fsdp", "tensor"), sizes)
    while columns and x.shape[2] % _num_parts(columns, sizes) == 0:
        data = "data" if "data" in sizes else None
        x = lax.with_sharding_constraint(x, PartitionSpec(data, None, columns))
        # Exchange columns over one axis at a time: XLA is inefficient for several.
        columns = columns[:-1]
    return lax.with_sharding_constraint(x, PartitionSpec(rows))


def split_head(embedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Splits a tied embedding along the vocabulary, for its use as the head."""
    # The embedding is stored split along D, for look-ups. Here, the devices exchange
    # parts, so that each has all columns of some rows, and none the whole embedding.
    sizes = _auto_axes()
    axes = select_axes(("fsdp", "tensor"), sizes)
    if not axes or embedding.shape[0] % _num_parts(axes, sizes):
        return embedding
    return lax.with_sharding_constraint(embedding, PartitionSpec(axes))


def split_attention(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps an attention function; each device then computes its rows and heads.

    XLA cannot partition a kernel such as that of `ql.memory.splash_attention`.
    """

    # Query is [B, T, H, Dh], key and value [B, S, K, Dh].
    def attend_split(query: Array, key: Array, value: Array, **settings: Any) -> Array:
        array_names = {"segment_ids", "sinks"} & {*settings}
        arrays = {name: settings.pop(name) for name in array_names}

        def attend_local(query, key, value, arrays):
            return attention(query, key, value, **arrays, **settings)

        if not (sizes := _auto_axes()):
            return attend_local(query, key, value, arrays)
        rows, tensor = select_axes(ROW_AXES, sizes), sizes.get("tensor", 1)
        if query.shape[0] % _num_parts(rows, sizes):
            rows = ()
        # If `tensor` does not divide the number of key heads, repeat the heads.
        repeats = math.lcm(key.shape[2], tensor) // key.shape[2]
        if repeats > 1:
            key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        heads = "tensor" if tensor > 1 else None
        spec = PartitionSpec(rows or None, None, heads)
        specs = {"segment_ids": PartitionSpec(rows or None)}
        specs["sinks"] = PartitionSpec(heads)
        return jax.shard_map(
            attend_local,
            in_specs=(spec, spec, spec, {name: specs[name] for name in arrays}),
            out_specs=spec,
            check_vma=False,  # kernels do not declare the axes their results vary over
        )(query, key, value, arrays)

    return attend_split


def _auto_axes() -> dict[str, int]:
    """Returns the sizes of the ambient mesh's Auto axes among `MESH_AXES`."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return {}
    axis_types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = {name for name, axis_type in axis_types if axis_type == AxisType.Auto}
    return {name: mesh.shape[name] for name in MESH_AXES if name in names}


def _num_parts(axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def select_axes(names: Iterable[str], sizes: dict[str, int]) -> tuple[str, ...]:
    """Returns the names that a mesh with these sizes has."""
    return tuple(name for name in names if name in sizes)
