"""A reference implementation of attention, straight from its definition."""

import numpy as np


def attention(query, key, value, visible, scale, soft_cap=None, xp=np, sinks=None):
    """Attention of `[B, T, H, D]` under a visibility mask, in NumPy or `jax.numpy`."""
    groups = query.shape[2] // key.shape[2]
    key, value = (xp.repeat(x, groups, axis=2) for x in (key, value))
    scores = xp.einsum("bthd,bshd->bhts", query, key) * scale
    if soft_cap is not None:
        scores = soft_cap * xp.tanh(scores / soft_cap)
    scores = xp.where(visible[:, None], scores, -xp.inf)
    largest = scores.max(axis=-1, keepdims=True)
    weights = xp.exp(scores - largest)
    sink = 0 if sinks is None else xp.exp(sinks[None, :, None, None] - largest)
    weights /= weights.sum(axis=-1, keepdims=True) + sink
    return xp.einsum("bhts,bshd->bthd", weights, value)


def in_float64(query, key, value, *options):
    operands = (np.asarray(x, np.float64) for x in (query, key, value))
    return attention(*operands, *map(np.asarray, options[:1]), *options[1:])
