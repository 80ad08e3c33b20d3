"""Streams tensors to device shards."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from ..quant.host_codes import HostShaped
from ..trees.paths import Tree, leaves_by_path
from .files import CheckpointError

PIECE = 1 << 21  # the number of weights to read at once: 8 MiB in float32

Device = Any  # None or a `jax.Device`, which pyright does not accept as a type
Index = tuple[slice, ...]
Arrays = tuple[Array, ...]


def on_devices(
    structs: Sequence[Array | jax.ShapeDtypeStruct],
    compute_shards: Callable[[Device, Sequence[Index]], Sequence[Array]],
) -> Arrays:
    """Returns arrays whose shards `compute_shards(device, parts)` computes.

    `parts` has one index for each array: the slices that the device holds. All
    `structs` must be on the same devices. Without shardings, the arrays are on JAX's
    default device.
    """
    if structs[0].sharding is None:  # entire arrays on one device
        parts = [tuple(slice(0, n) for n in s.shape) for s in structs]
        return tuple(compute_shards(None, parts))
    shardings: list[Any] = [s.sharding for s in structs]
    index_maps = [
        sharding.addressable_devices_indices_map(struct.shape)
        for sharding, struct in zip(shardings, structs, strict=True)
    ]
    # Devices that hold the same parts (replicas) share one computation, because reading
    # and packing take longer than a copy between devices.
    computed: dict[tuple, Sequence[Array]] = {}
    shards: list[list[Array]] = [[] for _ in structs]
    for device in index_maps[0]:
        parts = []
        for struct, index_map in zip(structs, index_maps, strict=True):
            sizes = zip(index_map[device], struct.shape, strict=True)
            parts.append(tuple(slice(*i.indices(n)[:2]) for i, n in sizes))
        key = tuple((i.start, i.stop) for part in parts for i in part)  # hashable
        if key not in computed:
            computed[key] = compute_shards(device, parts)
        zipped = zip(computed[key], shardings, shards, strict=True)
        for x, sharding, array_shards in zipped:
            target = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            array_shards.append(jax.device_put(x, target))
    return tuple(
        jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, x)
        for struct, x in zip(structs, shards, strict=True)
    )


def place_leaves(shapes: Tree, place: Callable[[Tree], Tree] | None) -> Tree:
    """Returns `place(shapes)`, which must have the same leaves; None places nothing."""
    if place is None:
        return shapes
    placed = place(shapes)
    leaves, placed_leaves = leaves_by_path(shapes), leaves_by_path(placed)
    missing = sorted(leaves.keys() - placed_leaves.keys())
    unexpected = sorted(placed_leaves.keys() - leaves.keys())
    if missing or unexpected:
        raise ValueError(
            "`place` must return a tree with the leaves that it gets. Missing: "
            f"{missing[:5]}. Unexpected: {unexpected[:5]}."
        )
    for path, leaf in leaves.items():
        shape = getattr(leaf, "shape", None)  # adapters have no shape
        placed_shape = getattr(placed_leaves[path], "shape", None)
        if shape != placed_shape:
            raise ValueError(
                f"`place` must return {path} with shape {shape}. Got {placed_shape}."
            )
    return placed


def put(x: Any, struct: Array | jax.ShapeDtypeStruct) -> Array:
    """Places an array or lazy tensor like `struct`; each device reads only its part."""
    if struct.sharding is None:  # an array that is not committed to a device
        return jnp.asarray(np.asarray(x))
    if tuple(x.shape) != struct.shape:  # codes have a different shape in host memory
        x = HostShaped(x)
    return jax.make_array_from_callback(
        struct.shape, struct.sharding, lambda index: np.asarray(x[index])
    )


def sizes_of(index: Index) -> tuple[int, ...]:
    """Returns the shape of a part."""
    return tuple(i.stop - i.start for i in index)


def new_buffer(device: Device, index: Index, dtype: DTypeLike) -> Array:
    """Returns zeros in the shape of a part, on a device."""
    return jnp.zeros(sizes_of(index), dtype, device=device)


def batch_indices(batch: Index) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields pairs: a batch index in the entire array, and the same one in the part."""
    for local in np.ndindex(*sizes_of(batch)):
        yield tuple(i.start + n for i, n in zip(batch, local, strict=True)), local


def pieces(part: slice, row_size: int) -> Iterator[slice]:
    """Yields slices of rows, each of one row or of at most `PIECE` weights."""
    # All slices but the last have the same size, so XLA compiles at most two programs.
    count = part.stop - part.start
    step = max(1, min(count, PIECE // max(row_size, 1)))
    for start in range(part.start, part.stop, step):
        yield slice(start, min(start + step, part.stop))


def read(tensor: Any, index: Index, dtype: DTypeLike) -> np.ndarray:
    """Reads a part of a tensor as an array of `dtype`."""
    return np.asarray(tensor[index]).astype(dtype, copy=False)


def checked_tensors(
    names: np.ndarray,
    batch: Index,
    problem: str = "must be finite. Got NaN or infinity.",
) -> Iterator[tuple[str, tuple[int, ...], Callable[[Array], None]]]:
    """Yields each tensor's name, its index in the part, and a function `check`.

    `names` are those of an entire leaf. `batch` is the slices of its batch axes that
    the part has. The loop's body passes a boolean scalar to `check` for each piece of
    the tensor; JAX may still be computing it. If one is false, the next iteration
    raises an error.
    """
    for index, local in batch_indices(batch):
        flags: list[Array] = []

        # The default value binds the list of this iteration, not of a later one.
        def check(is_valid: Array, flags: list[Array] = flags) -> None:
            flags.append(is_valid)
            if len(flags) > 1:
                # Waiting for the previous piece frees its copy on the host, so at most
                # two pieces are in memory.
                jax.block_until_ready(flags[-2])

        yield (name := names[index]), local, check
        if not all(map(bool, flags)):
            raise CheckpointError(f"{name} {problem}")
