"""The codes of a packed kernel in host memory.

On TPUs, arrays are tiled by 32 x 128 bytes on the device, but by 8 x 128 in host memory
if a program slices them there. With codes `[L, rows, N]`, a loop over layers would
convert the stack on the device in every step. An axis of 8 rows, in front of the last
axis, avoids this conversion. A block has at least 16 weights, so 8 divides the rows.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from .._jax.memory import HOST_KIND
from .._jax.pytree import register
from .._jax.specs import Axes

TILE_ROWS = 8

# Puts an array on a mesh and returns it: `put(array, axes, memory_kind)`.
Put = Callable[[Any, Sequence[Axes], str | None], Any]


@dataclass(frozen=True, eq=False)
class HostCodes:
    """Codes `[*batch, rows, N]` in host memory, as the `codes` of a QTensor.

    Indexing returns the codes of one kernel, on the device.
    """

    array: Array  # uint8 `[*batch, rows / 8, 8, N]`

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return _without_tiles(self.array.shape)

    @property
    def dtype(self) -> np.dtype:  # noqa: D102
        return self.array.dtype

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        return _codes_at(self, index)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None):
        codes = np.asarray(self.array).reshape(self.shape)
        return codes.astype(dtype or codes.dtype, copy=False)


register(HostCodes, ("array",), (), "qlora_jax.HostCodes")


def _without_tiles(shape: Sequence[int]) -> tuple[int, ...]:
    *batch, tiles, tile_rows, n = shape
    return (*batch, tiles * tile_rows, n)


@functools.partial(jax.jit, static_argnums=1)
def _codes_at(codes: HostCodes, index: tuple[int, ...]) -> Array:
    return on_device(HostCodes(codes.array[index]))


def placed_codes(
    codes: PyTree, put: Put, axes: Sequence[Axes], memory: str
) -> Array | HostCodes:
    """Returns codes on a mesh, in "device" or "host" memory."""
    if memory == "device":
        return put(on_device(codes), axes, None)
    if not isinstance(codes, HostCodes):
        codes = to_host_shape(codes)
    *batch, rows, n = axes
    return HostCodes(put(codes.array, (*batch, rows, (), n), HOST_KIND))


@dataclass(frozen=True)
class HostShaped:
    """Reshapes lazy codes `[*batch, rows, N]`, as in a file, when they are sliced.

    An index has the axes of `HostCodes.array`: batch, tiles, rows of a tile, and N.
    """

    codes: Any  # has a shape, and returns a NumPy array for slices

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *batch, tiles, _, columns = index
        start, stop, _ = tiles.indices(self.codes.shape[-2] // TILE_ROWS)
        rows = slice(start * TILE_ROWS, stop * TILE_ROWS)
        codes = np.asarray(self.codes[(*batch, rows, columns)])
        return np.asarray(to_host_shape(codes).array)


def to_host_shape(codes: PyTree) -> HostCodes:
    """Reshapes codes `[*batch, rows, N]` for host memory, without moving them."""
    if isinstance(codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(to_host_shape, codes)
    *batch, rows, n = codes.shape
    return HostCodes(codes.reshape(*batch, rows // TILE_ROWS, TILE_ROWS, n))


def on_device(codes: PyTree) -> Any:
    """Copies `HostCodes` to the device, `[*batch, rows, N]`; other codes stay as is."""
    if not isinstance(codes, HostCodes):
        return codes
    if isinstance(codes.array, jax.ShapeDtypeStruct):
        # Remove the entry for the axis of 8 rows from the sharding.
        host_sharding, sharding = codes.array.sharding, None
        if isinstance(host_sharding, NamedSharding):
            *batch, tiles, _, n = host_sharding.spec
            spec = PartitionSpec(*batch, tiles, n)
            sharding = NamedSharding(host_sharding.mesh, spec)
        return jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=sharding)
    array = jax.device_put(codes.array, jax.memory.Space.Device)
    return array.reshape(codes.shape)


def to_host(codes: Array, like: HostCodes) -> HostCodes:
    """Moves codes to host memory, with the shapes and the sharding of `like`."""
    # Move one kernel at a time. A move of all would need the stack on the device twice.
    array = like.array
    buffer = jax.device_put(np.zeros(array.shape, array.dtype), array.sharding)
    return HostCodes(_fill_on_host(array.sharding)(buffer, codes))


@functools.cache
def _fill_on_host(sharding: Sharding) -> Callable[[Array, Array], Array]:
    def fill(buffer: Array, codes: Array) -> Array:
        def copy_kernel(i: Array, buffer: Array) -> Array:
            kernel_codes = to_host_shape(lax.dynamic_slice_in_dim(codes, i, 1)).array
            on_host = jax.device_put(kernel_codes, jax.memory.Space.Host)
            return lax.dynamic_update_slice_in_dim(buffer, on_host, i, 0)

        return lax.fori_loop(0, len(codes), copy_kernel, buffer)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
