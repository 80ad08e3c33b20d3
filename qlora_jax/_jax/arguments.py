"""Arguments of public functions: arrays, integers such as ids and layers, and keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32


def as_array(name: str, x: Any) -> Array:
    """Returns an argument as an array; raises TypeError if it cannot be one."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:  # does not name the argument
        raise TypeError(
            f"`{name}` must be an array. Got {type(x).__name__}."
        ) from error


def check_key(name: str, key: Any) -> None:
    """Raises TypeError unless an argument is a PRNG key, or an array of them."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_key and (dtype != jnp.uint32 or key.ndim == 0):
        kind = type(key).__name__ if dtype is None else f"{dtype}{[*key.shape]}"
        raise TypeError(
            f"`{name}` must be a PRNG key, as jax.random.key(0) is. Got {kind}."
        )


def known_values(x: Any) -> np.ndarray | None:
    """Returns the values of an argument, or None where only the program knows them.

    A trace knows those of numbers, and of arrays that its function closes over, but
    operations on them would be traced: checks use NumPy.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
        return None
    # Other processes may hold a part of the array.
    is_here = not isinstance(x, jax.Array) or x.is_fully_addressable
    return np.asarray(x) if is_here else None


def checked_integers(name: str, x: Any) -> tuple[Int32[Array, "..."], Any]:
    """Returns an argument as int32, and its values, or None where they are not known.

    Raises TypeError if they are not integers.
    """
    values = known_values(x)
    array = as_array(name, x) if values is None else values
    if not jnp.issubdtype(array.dtype, jnp.integer):
        is_object = array.dtype == object
        kind = type(x).__name__ if is_object else array.dtype
        raise TypeError(f"`{name}` must be integers. Got {kind}.")
    return as_int32(array), values


def as_int32(x: Any) -> Int32[Array, "..."]:
    """Returns integers of any dtype as int32; larger ones become the largest int32."""
    x = x if isinstance(x, np.ndarray) else jnp.asarray(x)
    info, limits = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if info.min < limits.min or info.max > limits.max:
        x = x.clip(max(info.min, limits.min), limits.max)
    return jnp.asarray(x, jnp.int32)
