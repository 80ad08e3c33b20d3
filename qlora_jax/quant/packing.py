"""4-bit codes in bytes: row 2i in the high nibble, row 2i + 1 in the low one.

These are the bytes of a bitsandbytes `[N, K]` weight, transposed.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8


def pack_nibbles(
    codes: UInt8[Array, "*batch rows n"],
) -> UInt8[Array, "*batch half n"]:
    """Packs pairs of rows of 4-bit codes into bytes.

    Args:
        codes: Values below 16; an even number of rows.

    Returns:
        Half as many rows; row `i` holds rows `2i` (high) and `2i + 1` (low).
    """
    *batch, rows, n = codes.shape
    pairs = codes.reshape(*batch, rows // 2, 2, n)
    return (pairs[..., 0, :] << 4) | pairs[..., 1, :]


def unpack_nibbles(
    packed: UInt8[Array, "*batch half n"],
) -> UInt8[Array, "*batch rows n"]:
    """Inverts `pack_nibbles`: twice as many rows, values below 16."""
    *batch, half, n = packed.shape
    # One choice a row between two shifts by constants: processors have no shift of
    # bytes by an amount of each row's own.
    shape = (1,) * (len(batch) + 1) + (2, 1)
    is_low = lax.broadcasted_iota(jnp.uint8, shape, len(shape) - 2) != 0
    packed = packed[..., :, None, :]
    pairs = jnp.where(is_low, packed & np.uint8(15), packed >> 4)
    return pairs.reshape(*batch, 2 * half, n)
