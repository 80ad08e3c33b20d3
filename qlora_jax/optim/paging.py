"""Moves arrays of an optimizer's state between host and device memory."""

import jax
import jax.numpy as jnp
from jax import Array


def is_on_host(x: Array) -> bool:
    """Whether an array is in host memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def is_paged(x: Array) -> bool:
    """Whether an array of the state should be on the host. Scalars and keys are not."""
    return jnp.ndim(x) > 0 and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


def to_host(x: Array) -> Array:
    """Moves an array of the state to the host, unless it is a scalar or a key."""
    # In JAX, moving an array that is already on the host does nothing. But the TPU
    # compiler copies it to the device and back if its host layout is not the default.
    if is_on_host(x) or not is_paged(x):
        return x
    return jax.device_put(x, jax.memory.Space.Host)


def to_device(x: Array) -> Array:
    """Moves an array of the state to the device."""
    return jax.device_put(x, jax.memory.Space.Device) if is_paged(x) else x
