"""Checks of the arguments of public functions: arrays, integers and PRNG keys."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32, PyTree


def as_array(name: str, x: object, convert: Callable[[Any], Any] = jnp.asarray) -> Any:
    """Returns the argument `name` as an array, or raises an error that names it."""
    # The messages of JAX and NumPy do not say which argument is wrong.
    try:
        return convert(x)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be an array. Got {type(x).__name__}."
        ) from error
    except OverflowError as error:
        raise ValueError(f"`{name}` is out of range: {error}.") from error


def check_key(name: str, key: object) -> None:
    """Raises TypeError unless an argument is a PRNG key or an array of keys."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    is_typed_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    # Old-style keys (`jax.random.PRNGKey`) are uint32 arrays of 2 or 4 words per key.
    if not is_typed_key and (dtype != jnp.uint32 or not shape):
        kind = type(key).__name__ if dtype is None else f"{dtype}{[*shape]}"
        raise TypeError(
            f"`{name}` must be a PRNG key, such as jax.random.key(0). Got {kind}."
        )


def known_values(name: str, x: PyTree) -> np.ndarray | None:
    """Returns the argument `name` in NumPy, or None if its values are not available.

    The values of tracers are not available, nor are those of arrays that are partly on
    other processes. Checks use NumPy because a trace would record operations of
    `jax.numpy`, even on constants.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x)):
        return None
    is_addressable = not isinstance(x, jax.Array) or x.is_fully_addressable
    return as_array(name, x, np.asarray) if is_addressable else None


def checked_integers(
    name: str, x: object
) -> tuple[Int32[Array, "..."], np.ndarray | None]:
    """Returns an integer argument as int32, and its values if they are available."""
    values = known_values(name, x)
    array = as_array(name, x) if values is None else values
    if not jnp.issubdtype(array.dtype, jnp.integer):
        kind = type(x).__name__ if array.dtype == object else array.dtype
        raise TypeError(f"`{name}` must be integers. Got {kind}.")
    return as_int32(array), values


def as_int32(x: object) -> Int32[Array, "..."]:
    """Returns integers as int32. Values outside its range become the nearest int32."""
    # A cast would wrap around: an id of 2**32 would select row 0. `jnp.asarray` casts
    # 64-bit integers of NumPy, too, so they are clipped before it.
    array = x if isinstance(x, np.ndarray) else jnp.asarray(x)
    info, limits = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    if info.min < limits.min or info.max > limits.max:
        array = array.clip(max(info.min, limits.min), limits.max)
    return jnp.asarray(array, jnp.int32)


def unwrap_operands(operands: PyTree, frozen: PyTree, message: str) -> PyTree:
    """Returns the arrays that a `custom_vjp` with `symbolic_zeros` gets as operands.

    JAX wraps each array together with a flag that says whether it is differentiated.
    Raises ValueError with `message` if `frozen`, an operand, is differentiated.
    """

    def is_wrapped(leaf: object) -> bool:
        return hasattr(leaf, "perturbed")

    if any(leaf.perturbed for leaf in jax.tree.leaves(frozen, is_leaf=is_wrapped)):
        raise ValueError(message)
    return jax.tree.map(lambda leaf: leaf.value, operands, is_leaf=is_wrapped)
