"""The codes of a packed kernel in host memory.

On TPUs, arrays are tiled by 32 x 128 bytes on the device and by 8 x 128 where a program
slices one in host memory. With codes `[L, rows, N]`, a loop over layers would convert
the stack on the device in every step. An axis of 8 rows before the last avoids that.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .._jax.memory import HOST_KIND
from .._jax.pytree import register
from .._jax.specs import Axes

ROWS = 8  # of a tile


@dataclass(frozen=True, eq=False)
class HostCodes:
    """Codes `[*batch, rows, N]` in host memory, in the place of a QTensor's `codes`.

    `numpy.asarray` gives the codes; an index, those of one kernel on the device.
    """

    array: Any  # uint8 `[*batch, ceil(rows / 8), 8, N]`, filled up with zeros
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        *batch, _, _, n = self.array.shape
        return (*batch, self.rows, n)

    @property
    def dtype(self) -> Any:
        """The dtype of the codes."""
        return self.array.dtype

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        return _codes_at(self, index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        *batch, groups, rows, n = self.array.shape
        codes = np.asarray(self.array).reshape(*batch, groups * rows, n)
        return codes[..., : self.rows, :].astype(dtype or codes.dtype, copy=False)


register(HostCodes, ("array",), ("rows",), "qlora_jax.HostCodes")


def placed_codes(
    codes: Any, put: Callable[..., Any], axes: Sequence[Axes], memory: str
) -> Any:
    """Returns codes in either memory on a mesh; see `placed` in `qtensor.py`."""
    if memory == "device":
        return put(on_device(codes), axes, None)
    if not isinstance(codes, HostCodes):
        codes = to_host_shape(codes)
    *batch, rows, n = axes
    return HostCodes(put(codes.array, (*batch, rows, (), n), HOST_KIND), codes.rows)


@dataclass(frozen=True)
class HostShaped:
    """Codes `[*batch, rows, N]` read by slices, as from a file, in the host's shape."""

    codes: Any

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *batch, groups, _, columns = index
        count = self.codes.shape[-2]
        start, stop, _ = groups.indices(-(-count // ROWS))
        rows = slice(start * ROWS, min(stop * ROWS, count))
        return to_host_shape(np.asarray(self.codes[(*batch, rows, columns)])).array


def to_host_shape(codes: Any) -> HostCodes:
    """Returns codes `[*batch, rows, N]` in the shape of host memory, where they are."""
    if isinstance(codes, jax.ShapeDtypeStruct):
        return jax.eval_shape(to_host_shape, codes)
    *batch, rows, n = codes.shape
    rest = -rows % ROWS
    if rest:
        pad = np.pad if isinstance(codes, np.ndarray) else jnp.pad
        codes = pad(codes, [*[(0, 0)] * len(batch), (0, rest), (0, 0)])
    return HostCodes(codes.reshape(*batch, (rows + rest) // ROWS, ROWS, n), rows)


def on_device(codes: Any) -> Any:
    """Returns `HostCodes` as codes `[*batch, rows, N]` on the device; arrays pass."""
    if not isinstance(codes, HostCodes):
        return codes
    if isinstance(codes.array, jax.ShapeDtypeStruct):
        own, sharding = codes.array.sharding, None
        if isinstance(own, NamedSharding):
            *batch, groups, _, n = own.spec
            sharding = NamedSharding(own.mesh, PartitionSpec(*batch, groups, n))
        return jax.ShapeDtypeStruct(codes.shape, codes.dtype, sharding=sharding)
    array = jax.device_put(codes.array, jax.memory.Space.Device)
    *batch, groups, rows, n = array.shape
    array = array.reshape(*batch, groups * rows, n)
    return lax.slice_in_dim(array, 0, codes.rows, axis=len(batch))


@functools.partial(jax.jit, static_argnums=1)
def _codes_at(codes: HostCodes, index: tuple[int, ...]) -> Array:
    return on_device(HostCodes(codes.array[index], codes.rows))


def to_host(codes: Array, like: HostCodes) -> HostCodes:
    """Returns codes in host memory, with the shapes and the sharding of `like`."""
    # Kernel by kernel: moved at once, the stack would be on the device twice.
    array = like.array
    buffer = jax.device_put(np.zeros(array.shape, array.dtype), array.sharding)
    return HostCodes(_fill(array.sharding)(buffer, codes), like.rows)


@functools.cache
def _fill(sharding: Any) -> Any:
    def fill(buffer: Array, codes: Array) -> Array:
        def put(i: Array, buffer: Array) -> Array:
            one = lax.dynamic_slice_in_dim(codes, i, 1)
            one = jax.device_put(to_host_shape(one).array, jax.memory.Space.Host)
            return lax.dynamic_update_slice_in_dim(buffer, one, i, 0)

        return lax.fori_loop(0, len(codes), put, buffer)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
