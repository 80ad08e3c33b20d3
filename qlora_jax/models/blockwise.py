"""Attention in blocks, without the scores of all queries and keys (FlashAttention).

Dao et al. 2022, sections 3.1 and B.4; Dao 2023, section 3.1. Blocks of keys that no
query of a block sees are skipped: half in causal attention, most in packed rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

import qlora_jax as ql

from .products import einsum_f32

BLOCK = 128  # queries, and keys
# The score of a key that is not seen. It is finite, so that a query has a maximum in a
# block in which it sees no key.
_UNSEEN = -1e30


class _Settings(NamedTuple):
    scale: float
    soft_cap: float | None
    block: int


class _Mask(NamedTuple):
    """The mask, and the range of key blocks that each block of queries visits."""

    visible: Bool[Array, "B T S"]
    first: Int[Array, " blocks"]
    stop: Int[Array, " blocks"]


def attend_in_blocks(
    query: Float[Array, "N G T Dh"],
    key: Float[Array, "N S Dh"],
    value: Float[Array, "N S Dh"],
    visible: Bool[Array, "B T S"],
    scale: float,
    soft_cap: float | None,
    block: int,
) -> Float[Array, "N G T Dh"]:
    """Computes attention in blocks: N is B times the key heads, G the heads of each."""
    tokens = query.shape[2]
    rows, columns = -tokens % block, -key.shape[1] % block
    pad = lambda x, count: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count), (0, 0)])
    operands = pad(query, rows), pad(key, columns), pad(value, columns)
    visible = jnp.pad(visible, ((0, 0), (0, rows), (0, columns)))
    settings = _Settings(scale, soft_cap, block)
    mixed: Any = _attend(settings, *operands, _mask(visible, block))
    return mixed[:, :, :tokens]


def _mask(visible: Bool[Array, "B T S"], block: int) -> _Mask:
    """Finds the range of key blocks that each block of queries sees."""
    b, t, s = visible.shape
    blocks = visible.reshape(b, t // block, block, s // block, block)
    is_seen = jnp.any(blocks, axis=(0, 2, 4))
    first = jnp.argmax(is_seen, axis=1)
    stop = is_seen.shape[1] - jnp.argmax(is_seen[:, ::-1], axis=1)
    return _Mask(visible, first, jnp.where(jnp.any(is_seen, axis=1), stop, first))


# Forward, for the scores s of a query in the next block of keys, with the running
# maximum m, sum l and unnormalized result a:
#   m' = max(m, max s)
#   l' = l exp(m - m') + sum exp(s - m')
#   a' = a exp(m - m') + exp(s - m') V
# The result is o = a / l. Saved for the backward pass: the operands, o and
# L = m + log l, one number a query, which gives the weights again: p = exp(s - L).
#
# Backward, for the cotangent g of o:
#   dV = p^T g
#   dp = g V^T
#   ds = p * (dp - sum(p * dp)) = p * (dp - g . o)
#   dQ = scale ds K
#   dK = scale ds^T Q
# g . o is one number a query. With a soft-cap c, s = c tanh(z / c), so that
# dz = ds * (1 - (s / c)^2).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, mask) -> Any:
    return _forward(settings, query, key, value, mask)[0]


def _scores(settings, query, key, visible):
    """Returns the capped, masked scores `[N, G, block, block]` in float32."""
    scores = einsum_f32("ngtd,nsd->ngts", query, key) * settings.scale
    scores = ql.losses.soft_cap(scores, settings.soft_cap)
    (b, t, s), rows = visible.shape, scores.shape[0]
    by_head = jnp.broadcast_to(visible[:, None], (b, rows // b, t, s))
    return jnp.where(by_head.reshape(rows, 1, t, s), scores, _UNSEEN)


def _at(x: Array, index: Array, block: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _put(x: Array, new: Array, index: Array, block: int, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), index * block, axis)


def _forward(settings, query, key, value, mask):
    """Returns the result, and the logarithm of the sum of each query's weights."""
    n, g, t, d = query.shape
    block = settings.block

    def of_queries(i, carry):
        mixed, logs = carry
        q, rows = _at(query, i, block, 2), _at(mask.visible, i, block, 1)

        def of_keys(j, carry):
            highest, total, acc = carry
            visible = _at(rows, j, block, 2)
            scores = _scores(settings, q, _at(key, j, block, 1), visible)
            new = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new[..., None])
            factor = jnp.exp(highest - new)
            total = total * factor + jnp.sum(weights, axis=-1)
            weights = weights.astype(value.dtype)
            part = einsum_f32("ngts,nsd->ngtd", weights, _at(value, j, block, 1))
            return new, total, acc * factor[..., None] + part

        start = jnp.full((n, g, block), _UNSEEN, jnp.float32)
        empty = jnp.zeros((n, g, block, d), jnp.float32)
        highest, total, acc = lax.fori_loop(
            mask.first[i], mask.stop[i], of_keys, (start, jnp.zeros_like(start), empty)
        )
        total = jnp.where(total == 0, 1, total)  # padding: it visits nothing
        mixed = _put(mixed, acc / total[..., None], i, block, 2)
        return mixed, _put(logs, highest + jnp.log(total), i, block, 2)

    logs = jnp.zeros((n, g, t), jnp.float32)
    return lax.fori_loop(
        0, t // block, of_queries, (jnp.zeros(query.shape, value.dtype), logs)
    )


def _attend_fwd(settings, query, key, value, mask):
    mixed, logs = _forward(settings, query, key, value, mask)
    # Policies that keep a layer's products keep these too, so that the backward pass
    # does not run the forward pass again.
    mixed, logs = checkpoint_name(mixed, "product"), checkpoint_name(logs, "product")
    return mixed, (query, key, value, mask, mixed, logs)


def _attend_bwd(settings, residuals, g):
    query, key, value, mask, mixed, logs = residuals
    block = settings.block
    # g . o of the derivation.
    common = jnp.sum(g.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    g = g.astype(value.dtype)

    def of_queries(i, carry):
        d_query, *carry = carry
        q, go = _at(query, i, block, 2), _at(g, i, block, 2)
        log, shared = _at(logs, i, block, 2), _at(common, i, block, 2)
        rows = _at(mask.visible, i, block, 1)

        def of_keys(j, carry):
            d_q, d_key, d_value = carry
            k, v = _at(key, j, block, 1), _at(value, j, block, 1)
            visible = _at(rows, j, block, 2)
            scores = _scores(settings, q, k, visible)
            weights = jnp.exp(scores - log[..., None])
            d_scores = weights * (
                einsum_f32("ngtd,nsd->ngts", go, v) - shared[..., None]
            )
            if settings.soft_cap is not None:
                capped = jnp.where(scores == _UNSEEN, 0, scores / settings.soft_cap)
                d_scores *= 1 - capped * capped
            d_scores = (d_scores * settings.scale).astype(query.dtype)
            weights = weights.astype(value.dtype)
            d_q += einsum_f32("ngts,nsd->ngtd", d_scores, k)
            d_k = _at(d_key, j, block, 1) + einsum_f32("ngts,ngtd->nsd", d_scores, q)
            d_v = _at(d_value, j, block, 1) + einsum_f32("ngts,ngtd->nsd", weights, go)
            return d_q, _put(d_key, d_k, j, block, 1), _put(d_value, d_v, j, block, 1)

        d_q = jnp.zeros(q.shape, jnp.float32)
        d_q, *carry = lax.fori_loop(mask.first[i], mask.stop[i], of_keys, (d_q, *carry))
        return _put(d_query, d_q, i, block, 2), *carry

    zeros = lambda x, dtype: jnp.zeros(x.shape, dtype)
    sums = zeros(key, jnp.float32), zeros(value, jnp.float32)
    d_query, d_key, d_value = lax.fori_loop(
        0, query.shape[2] // block, of_queries, (zeros(query, query.dtype), *sums)
    )
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
