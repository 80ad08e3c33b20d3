"""Packs weights in llama.cpp's Q4_K, Q5_K and Q6_K; the gguf package decodes them.

In all three formats, a block is 256 weights of a row, and is divided into groups. Each
group has a scale of a few bits, and each block has a float16 step, by which these
scales are multiplied:

- Q4_K and Q5_K: A block has 8 groups of 32 weights, and a weight is `d s c - m o`. Its
  code c has 4 or 5 bits. The integers s and o have 6 bits, and belong to the group. The
  steps d and m are float16, and belong to the block. The offset `m o` is not negative.
- Q6_K: A block has 16 groups of 16 weights, and a weight is `d s (c - 32)`. Its code c
  has 6 bits, s is an int8 of the group, and d is a float16 of the block.

The squared error is made small in three steps. First, a search finds a float32 scale
and offset for each group on its own. Then these are rounded: to `d s` and `m o`. Last,
each weight gets the nearest code for the rounded scale and offset.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

K_QUANT_BLOCK = 256  # number of inputs in a block
_CODE_BITS = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
K_QUANTS = tuple(_CODE_BITS)
_LARGEST_SCALE = 63  # the largest value of s and o in Q4_K and Q5_K
_CHUNK = 4096  # number of blocks that are packed at a time, to save memory
# The search tries several scales for each group: the range of its weights, divided by
# the largest code plus one of these numbers. With 0, the codes cover the range exactly.
_CODE_SHIFTS = np.linspace(-1, 1, 11, dtype=np.float32)
_REFITS = 2  # for each start: how often codes are chosen, and a scale fitted to them
_TINY = 1e-30  # replaces a divisor of 0, for which every numerator is 0


def pack_k_quant(
    x: Float32[np.ndarray, "*rows k"], fmt: str
) -> UInt8[np.ndarray, "*rows bytes"]:
    """Packs finite weights in "Q4_K", "Q5_K" or "Q6_K"; 256 must divide K.

    Args:
        x: The weights; each row has the weights of an output.
        fmt: The format.

    Returns:
        The bytes of each row, as in a GGUF file.

    Example:
        >>> import gguf
        >>> x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
        >>> packed = pack_k_quant(x, "Q4_K")
        >>> packed.shape  # 4.5 bits per weight
        (2, 144)
        >>> decoded = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_K)
        >>> bool(abs(decoded - x).max() < 0.05)
        True
    """
    blocks = np.ascontiguousarray(x).reshape(-1, K_QUANT_BLOCK)
    bits = _CODE_BITS[fmt]
    pack = _pack_symmetric if fmt == "Q6_K" else partial(_pack_affine, bits=bits)
    chunks = range(0, len(blocks), _CHUNK)
    packed = [pack(blocks[start : start + _CHUNK]) for start in chunks]
    return np.concatenate(packed).reshape(*x.shape[:-1], -1)


# Q4_K and Q5_K


def _pack_affine(blocks: Float32[np.ndarray, "n 256"], bits: int) -> np.ndarray:
    x = blocks.reshape(-1, 8, 32)
    largest_code = 2**bits - 1
    scale, offset = jax.device_get(_search_affine(x, largest_code))
    (d, s), (m, o) = _round_positive(scale), _round_positive(offset)
    scale, offset = np.float32(d) * s, np.float32(m) * o
    codes = (x + offset[..., None]) / np.maximum(scale, _TINY)[..., None]
    codes = np.clip(np.round(codes), 0, largest_code).astype(np.uint8)
    parts = [d.view(np.uint8), m.view(np.uint8), _join_numbers(s, o)]
    if bits == 5:
        # Bit i of a byte is the highest bit of a code of group i.
        high_bits = (codes >> 4) << np.arange(8, dtype=np.uint8)[:, None]
        parts.append(np.bitwise_or.reduce(high_bits, axis=1))
    # Two groups share 32 bytes: the low halves have the codes of the first group.
    pairs = (codes & 15).reshape(-1, 4, 2, 32)
    parts.append((pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128))
    return np.concatenate(parts, axis=-1)


@partial(jax.jit, static_argnames="largest_code")
def _search_affine(
    x: Float32[Array, "n 8 32"], largest_code: int
) -> tuple[Float32[Array, "n 8"], Float32[Array, "n 8"]]:
    """Returns scales and offsets such that `scale * code - offset` is close to `x`.

    Neither is negative. The search alternates two steps: it finds the nearest codes for
    a scale and offset, and then the scale and offset with the least squared error for
    these codes.
    """
    lowest = jnp.minimum(x.min(-1), 0)  # so that the offset, -lowest, is not negative
    extent = x.max(-1) - lowest

    def try_start(best: tuple[Array, ...], shift: Array):
        scale, offset = extent / (largest_code + shift), -lowest
        for _ in range(_REFITS):
            codes = (x + offset[..., None]) / jnp.maximum(scale, _TINY)[..., None]
            codes = jnp.clip(jnp.round(codes), 0, largest_code)
            scale, offset = _fit_affine(x, codes)
            errors = scale[..., None] * codes - offset[..., None] - x
            trial = jnp.sum(errors**2, -1), scale, offset
            is_better = trial[0] < best[0]
            best = tuple(
                jnp.where(is_better, *pair) for pair in zip(trial, best, strict=True)
            )
        return best, None

    start = jnp.full_like(extent, jnp.inf), extent, -lowest
    (_, scale, offset), _ = jax.lax.scan(try_start, start, jnp.asarray(_CODE_SHIFTS))
    return scale, offset


def _fit_affine(
    x: Float32[Array, "n 8 32"], codes: Float32[Array, "n 8 32"]
) -> tuple[Float32[Array, "n 8"], Float32[Array, "n 8"]]:
    """Returns the least-squares scales and nonnegative offsets for some codes."""
    mean, mean_code = x.mean(-1), codes.mean(-1)
    centered = codes - mean_code[..., None]
    variance = jnp.maximum(jnp.sum(centered**2, -1), _TINY)
    scale = jnp.sum(centered * x, -1) / variance
    offset = scale * mean_code - mean
    # Where the best offset would be negative, it is 0, with the best scale for that.
    norm = jnp.maximum(jnp.sum(codes**2, -1), _TINY)
    through_zero = jnp.sum(codes * x, -1) / norm
    is_negative = offset < 0
    return jnp.where(is_negative, through_zero, scale), jnp.maximum(offset, 0)


def _round_positive(
    x: Float32[np.ndarray, "n 8"],
) -> tuple[np.ndarray, UInt8[np.ndarray, "n 8"]]:
    """Returns a float16 step for each block and 6-bit integers for its groups.

    Their products are close to `x`. The steps have shape `[n, 1]`.
    """
    # This uses NumPy, because XLA on CPUs flushes subnormal float16 numbers to 0, and
    # the steps of ordinary weights are subnormal.
    steps = (x.max(-1, keepdims=True) / _LARGEST_SCALE).astype(np.float16)
    numbers = np.round(x / np.maximum(steps, _TINY, dtype=np.float32))
    return steps, np.minimum(numbers, _LARGEST_SCALE).astype(np.uint8)


def _join_numbers(
    scales: UInt8[np.ndarray, "n 8"], offsets: UInt8[np.ndarray, "n 8"]
) -> UInt8[np.ndarray, "n 12"]:
    """Stores the 6-bit numbers of 8 groups in 12 bytes.

    Bytes 0 to 3 have the scales of the first four groups in their low 6 bits, and bytes
    4 to 7 have the offsets of these groups. Bytes 8 to 11 have the low 4 bits of the
    numbers of the last four groups: those of a scale in the low half of a byte, and
    those of an offset in the high half. The high 2 bits of these scales and offsets are
    the high 2 bits of bytes 0 to 3 and of bytes 4 to 7.
    """
    first, last = np.split(np.stack([scales, offsets], axis=1), 2, axis=-1)
    with_high_bits = (first | (last >> 4) << 6).reshape(-1, 8)
    low_bits = (last[:, 0] & 15) | (last[:, 1] & 15) << 4
    return np.concatenate([with_high_bits, low_bits], axis=-1)


# Q6_K


def _pack_symmetric(blocks: Float32[np.ndarray, "n 256"]) -> np.ndarray:
    x = blocks.reshape(-1, 16, 16)
    scale = np.asarray(_search_symmetric(x))
    largest = np.argmax(np.abs(scale), axis=-1, keepdims=True)
    # The scale with the largest magnitude gets s = -128. The step d has the opposite
    # sign of this scale.
    d = (np.take_along_axis(scale, largest, -1) / -128).astype(np.float16)
    s = scale / np.where(d, d, 1).astype(np.float32)
    s = np.clip(np.round(s), -128, 127)
    scale = np.float32(d) * s
    codes = x / np.where(scale, scale, 1)[..., None]
    codes = (np.clip(np.round(codes), -32, 31) + 32).astype(np.uint8)
    # Each half of a block has 128 codes, which are arranged in four rows of 32. The low
    # 4 bits of codes from rows 0 and 2, or from rows 1 and 3, share a byte. The high 2
    # bits of one code from each row share another byte.
    rows = codes.reshape(-1, 2, 4, 32)
    low_bits = (rows & 15)[:, :, :2] | (rows & 15)[:, :, 2:] << 4
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high_bits = np.bitwise_or.reduce((rows >> 4) << shifts, axis=2)
    return np.concatenate(
        [
            low_bits.reshape(-1, 128),
            high_bits.reshape(-1, 64),
            s.astype(np.int8).view(np.uint8),
            d.view(np.uint8),
        ],
        axis=-1,
    )


@jax.jit
def _search_symmetric(x: Float32[Array, "n 16 16"]) -> Float32[Array, "n 16"]:
    """Returns scales such that `scale * code` is close to `x`.

    The codes are from -32 to 31. The search is like that of `_search_affine`.
    """
    largest = jnp.argmax(jnp.abs(x), axis=-1, keepdims=True)
    extreme = jnp.take_along_axis(x, largest, -1)[..., 0]

    def try_start(best: tuple[Array, Array], shift: Array):
        # With this scale, the weight with the largest magnitude has a code near -32.
        scale = extreme / (shift - 32)
        for _ in range(_REFITS):
            codes = x / jnp.where(scale == 0, 1, scale)[..., None]
            codes = jnp.clip(jnp.round(codes), -32, 31)
            product = jnp.sum(codes * x, -1)
            norm = jnp.maximum(jnp.sum(codes**2, -1), _TINY)
            # The best scale for these codes, and how much it lowers the squared error.
            scale, gain = product / norm, product**2 / norm
            is_better = gain > best[0]
            best = (
                jnp.where(is_better, gain, best[0]),
                jnp.where(is_better, scale, best[1]),
            )
        return best, None

    start = jnp.zeros_like(extreme), jnp.zeros_like(extreme)
    return jax.lax.scan(try_start, start, jnp.asarray(_CODE_SHIFTS))[0][1]
