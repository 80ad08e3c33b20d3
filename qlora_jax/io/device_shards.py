"""Streams tensors to device shards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from ..quant.host_codes import HostShaped
from .files import CheckpointError

PIECE = 1 << 21  # weights read at once: 8 MiB in float32

Index = tuple[slice, ...]
Arrays = tuple[Array, ...]


def on_devices(
    structs: Sequence[jax.ShapeDtypeStruct],
    make: Callable[[Any, Sequence[Index]], Sequence[Array]],
) -> Arrays:
    """Returns arrays that `make(device, parts)` computes for each device.

    `parts` are slices, one for each array. Equal parts are made once. All `structs` are
    on the same devices; without a sharding they are on JAX's default device.
    """
    if structs[0].sharding is None:
        return tuple(make(None, [tuple(slice(0, n) for n in s.shape) for s in structs]))
    maps: list[Any] = [
        s.sharding.addressable_devices_indices_map(s.shape) for s in structs
    ]
    made: dict[Any, Sequence[Array]] = {}
    shards: list[list[Array]] = [[] for _ in structs]
    for device in maps[0]:
        parts = [
            tuple(
                slice(*i.indices(n)[:2])
                for i, n in zip(m[device], s.shape, strict=True)
            )
            for m, s in zip(maps, structs, strict=True)
        ]
        key = tuple((i.start, i.stop) for part in parts for i in part)
        if key not in made:
            made[key] = make(device, parts)
        for array, struct, shard in zip(made[key], structs, shards, strict=True):
            one = SingleDeviceSharding(device, memory_kind=struct.sharding.memory_kind)
            shard.append(jax.device_put(array, one))
    return tuple(
        jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, shard)
        for struct, shard in zip(structs, shards, strict=True)
    )


def put(x: Any, struct: jax.ShapeDtypeStruct) -> Array:
    """Returns an array, or a tensor in a file, on its sharding; devices read parts."""
    if struct.sharding is None:
        return jnp.asarray(np.asarray(x))
    if tuple(x.shape) != struct.shape:  # codes have another shape in host memory
        x = HostShaped(x)
    part = lambda index: np.asarray(x[index])
    return jax.make_array_from_callback(struct.shape, struct.sharding, part)


def sizes_of(index: Index) -> tuple[int, ...]:
    """Returns the shape of a part."""
    return tuple(i.stop - i.start for i in index)


def empty(device: Any, index: Index, dtype: Any) -> Array:
    """Returns zeros on a device, in the shape of a part."""
    return jnp.zeros(sizes_of(index), dtype, device=device)


def cells(batch: Index) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields each batch index, and its position in the device's part."""
    for place in np.ndindex(*sizes_of(batch)):
        yield tuple(i.start + p for i, p in zip(batch, place, strict=True)), place


def pieces(part: slice, row_size: int) -> Iterator[slice]:
    """Yields slices of rows of at most `PIECE` weights, of one size if possible."""
    count = part.stop - part.start
    step = max(1, min(count, PIECE // max(row_size, 1)))
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))


def read(tensor: Any, index: Index, dtype: Any) -> np.ndarray:
    """Reads a part of a tensor as an array of `dtype`."""
    return np.asarray(tensor[index]).astype(dtype, copy=False)


def checked_cells(
    names: np.ndarray,
    batch: Index,
    problem: str = "must be finite. Got NaN or infinity.",
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Array], None]]]:
    """Yields each tensor's name, its position, and a check of whether it is finite.

    The check takes a scalar for each piece, which need not be computed yet.
    """
    for index, place in cells(batch):
        found: list[Array] = []

        def check(is_finite: Array, found: list[Array] = found) -> None:
            found.append(is_finite)
            if len(found) > 1:  # the piece before is on the device, and can be freed
                jax.block_until_ready(found[-2])

        yield (name := names[index]), place, check
        if not all(map(bool, found)):
            raise CheckpointError(f"{name} {problem}")
