"""Encodes and decodes the dynamic data type: 256 values of an 8-bit code.

Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, section 1.3.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


# After the sign, leading zeros of a code are a decimal exponent, and the bits after the
# first one are a linear fraction. Decade `e` of `[0.1, 1] * 10**(e - top)` has 2**e
# values, the centers of as many equal parts. Zero and 1 are added. The unsigned map has
# one more bit of fraction. Codes are positions in the sorted map, and the *index* of a
# value counts from zero. Values are computed from the bits of a code: a look-up in a
# table of 256 is slow on TPUs.
#
# A decade's values are `step * (18 * index + offset)`. The factor in parentheses is a
# small integer, so that each value is one product of two float32 numbers, which is the
# same on every device; sums of products are not. For the value 1 the factor is 1.
class DynamicMap(NamedTuple):
    """Constants of a map, for 9 groups of values: zero, seven decades, and 1."""

    zero: int  # code of zero
    first: int  # added to the index, so that its highest bit tells the decade
    offset: np.ndarray
    step: np.ndarray
    least: np.ndarray  # smallest magnitude that rounds to a value of the group
    low: np.ndarray  # lower end of the decade
    parts: np.ndarray  # equal parts of the decade, for each unit
    base: np.ndarray  # index of its first value, with `first` added


@functools.cache
def dynamic_map(signed: bool) -> DynamicMap:
    """Returns the map of signed or of non-negative values."""
    top, first = (6, 0) if signed else (7, 1)
    decades = range(first, top + 1)
    scale = {e: 10.0 ** (e - top) for e in decades}
    lowest = [scale[e] * (0.1 + 0.45 / 2**e) for e in decades] + [1.0]
    highest = [0.0] + [scale[e] * (1 - 0.45 / 2**e) for e in decades]
    middle = [(a + b) / 2 for a, b in zip(highest, lowest, strict=True)]
    array = lambda zero, each, one: np.array(
        [zero, *(each(e) for e in decades), one], np.float32
    )
    last = 2 ** (top + 1)
    return DynamicMap(
        zero=127 if signed else 0,
        first=first,
        offset=array(0, lambda e: 9 - 16 * 2**e, 1 - 18 * last),
        step=array(0, lambda e: scale[e] / (20 * 2**e), 1),
        least=np.array([0, *middle], np.float32),
        low=array(0, lambda e: 0.1 * scale[e], 0),
        parts=array(0, lambda e: 2**e / (0.9 * scale[e]), 0),
        base=array(first, lambda e: 2**e, last),
    )


def decode(codes: jax.Array, signed: bool) -> jax.Array:
    """Returns the float32 values in [-1, 1] of integer codes."""
    table = dynamic_map(signed)
    codes = codes.astype(jnp.int32)
    index = lax.abs(codes - table.zero) + table.first
    group = (32 - lax.clz(index)) - table.first
    numerator = 18.0 * index.astype(jnp.float32) + _pick(group, table.offset)
    value = numerator * _pick(group, table.step)
    return jnp.where(codes < table.zero, -value, value)


def encode(x: jax.Array, signed: bool) -> jax.Array:
    """Returns uint32 codes of the nearest values to finite float32 `x` in [-1, 1]."""
    table = dynamic_map(signed)
    size = lax.abs(x)
    group: Any = sum((size >= least).astype(jnp.int32) for least in table.least[1:])
    if not signed:  # Adam divides by the root of it: a positive value is not zero.
        group = lax.max(group, (x > 0).astype(jnp.int32))
    base = _pick(group, table.base)
    # A difference and then a product: there is no rounding for a compiler to leave out.
    part = jnp.floor((size - _pick(group, table.low)) * _pick(group, table.parts))
    index = base + jnp.clip(part, 0.0, jnp.maximum(base - 1, 0.0)) - table.first
    if signed:  # There is a 1, but no -1.
        index = jnp.where(x < 0, -jnp.minimum(index, 127.0), index)
    return (index + table.zero).astype(jnp.uint32)


def _pick(group: jax.Array, values: np.ndarray) -> jax.Array:
    """Returns `values[group]` by selects."""
    cases = [lax.full_like(group, v, jnp.float32) for v in values]
    return lax.select_n(group, *cases)
