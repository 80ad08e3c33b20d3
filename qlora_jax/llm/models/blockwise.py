"""Attention in blocks, which never stores all scores at once (FlashAttention).

See Dao et al. 2022, sections 3.1 and B.4, and Dao 2023, section 3.1. A block of queries
skips the blocks of keys that none of its queries sees: half of all blocks in causal
attention, and most blocks in packed rows.
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

BLOCK = 128  # size of the blocks of queries and of the blocks of keys
# The score of a key that is not visible. It is finite, so that the running maximum of a
# query is finite even after a block in which it sees no key.
_MASKED = -1e30


class _Settings(NamedTuple):
    scale: float  # factor of the products of queries and keys
    soft_cap: float | None
    block: int  # size of the blocks of queries and of the blocks of keys


class _Mask(NamedTuple):
    """The mask, and the range of key blocks that each block of queries visits."""

    visible: Bool[Array, "B T S"]  # T and S are padded to whole blocks
    first: Int[Array, " blocks"]  # the first key block of each block of queries
    stop: Int[Array, " blocks"]  # one past its last key block


def attend_in_blocks(
    query: Float[Array, "N G T Dh"],
    key: Float[Array, "N S Dh"],
    value: Float[Array, "N S Dh"],
    visible: Bool[Array, "B T S"],
    scale: float,
    soft_cap: float | None,
    block: int,
) -> Float[Array, "N G T Dh"]:
    """Computes attention in blocks.

    N is B times the number of key heads; G query heads share each key head.
    """
    # Pad to whole blocks. The mask hides all keys from the queries that are padding,
    # and the keys that are padding from all queries.
    tokens = query.shape[2]
    rows, columns = (0, -tokens % block), (0, -key.shape[1] % block)
    query = jnp.pad(query, ((0, 0), (0, 0), rows, (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), columns, (0, 0))) for x in (key, value))
    mask = _find_ranges(jnp.pad(visible, ((0, 0), rows, columns)), block)
    # pyright loses the type of a custom VJP with static arguments.
    mixed: Any = _attend(_Settings(scale, soft_cap, block), query, key, value, mask)
    return mixed[:, :, :tokens]


def _find_ranges(visible: Bool[Array, "B T S"], block: int) -> _Mask:
    b, t, s = visible.shape
    blocks = visible.reshape(b, t // block, block, s // block, block)
    is_visited = jnp.any(blocks, axis=(0, 2, 4))  # [blocks of queries, blocks of keys]
    first = jnp.argmax(is_visited, axis=1)
    stop = is_visited.shape[1] - jnp.argmax(is_visited[:, ::-1], axis=1)
    return _Mask(visible, first, jnp.where(jnp.any(is_visited, axis=1), stop, first))


# Forward, for the scores s of a query in the next block of keys, with the running
# maximum m, sum l and unnormalized result a:
#   m' = max(m, max s)
#   l' = l exp(m - m') + sum exp(s - m')
#   a' = a exp(m - m') + exp(s - m') V
# The result is o = a / l. The backward pass needs the operands, o, and L = m + log l.
# L is one number for each query, and gives the weights: p = exp(s - L).
#
# Backward, for the cotangent g of o:
#   dV = p^T g
#   dp = g V^T
#   ds = p * (dp - sum(p * dp)) = p * (dp - g . o)
#   dQ = scale ds K
#   dK = scale ds^T Q
# g . o is one number for each query. With a soft-cap c, s = c tanh(z / c), so that
# dz = ds * (1 - (s / c)^2).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, mask) -> Array:
    return _run_forward(settings, query, key, value, mask)[0]


def _compute_scores(settings, query, key, visible):
    """Returns the capped, masked scores `[N, G, block, block]` in float32."""
    scores = einsum_f32("ngtd,nsd->ngts", query, key) * settings.scale
    scores = ql.losses.soft_cap(scores, settings.soft_cap)
    (b, t, s), n = visible.shape, scores.shape[0]
    by_head = jnp.broadcast_to(visible[:, None], (b, n // b, t, s))
    return jnp.where(by_head.reshape(n, 1, t, s), scores, _MASKED)


def _get_block(x: Array, index: Array, block: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _set_block(x: Array, update: Array, index: Array, block: int, axis: int) -> Array:
    return lax.dynamic_update_slice_in_dim(
        x, update.astype(x.dtype), index * block, axis
    )


def _run_forward(settings, query, key, value, mask):
    """Returns o `[N, G, T, Dh]` and L `[N, G, T]` of the derivation."""
    n, g, t, d = query.shape
    block = settings.block

    def visit_queries(i, carry):
        mixed, logs = carry
        q = _get_block(query, i, block, 2)  # [N, G, block, Dh]
        visible_rows = _get_block(mask.visible, i, block, 1)  # [B, block, S]

        def visit_keys(j, carry):
            highest, total, acc = carry  # m, l and a of the derivation
            visible = _get_block(visible_rows, j, block, 2)
            scores = _compute_scores(settings, q, _get_block(key, j, block, 1), visible)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])  # unnormalized
            factor = jnp.exp(highest - new_highest)
            total = total * factor + jnp.sum(weights, axis=-1)
            weights = weights.astype(value.dtype)
            v = _get_block(value, j, block, 1)
            part = einsum_f32("ngts,nsd->ngtd", weights, v)  # [N, G, block, Dh]
            return new_highest, total, acc * factor[..., None] + part

        lowest = jnp.full((n, g, block), _MASKED, jnp.float32)
        start = lowest, jnp.zeros_like(lowest), jnp.zeros((n, g, block, d), jnp.float32)
        highest, total, acc = lax.fori_loop(
            mask.first[i], mask.stop[i], visit_keys, start
        )
        # Blocks of padding visit no keys: their sum is zero, and their result unused.
        total = jnp.where(total == 0, 1, total)
        mixed = _set_block(mixed, acc / total[..., None], i, block, 2)
        return mixed, _set_block(logs, highest + jnp.log(total), i, block, 2)

    mixed = jnp.zeros(query.shape, value.dtype)
    logs = jnp.zeros((n, g, t), jnp.float32)
    return lax.fori_loop(0, t // block, visit_queries, (mixed, logs))


def _attend_fwd(settings, query, key, value, mask):
    mixed, logs = _run_forward(settings, query, key, value, mask)
    # Policies that keep a layer's products keep these too, so that the backward pass
    # does not run the forward pass again.
    mixed, logs = checkpoint_name(mixed, "product"), checkpoint_name(logs, "product")
    return mixed, (query, key, value, mask, mixed, logs)


def _attend_bwd(settings, residuals, g):
    query, key, value, mask, mixed, logs = residuals
    block = settings.block
    # g . o of the derivation, [N, G, T].
    g_dot_o = jnp.sum(g.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)
    g = g.astype(value.dtype)

    def visit_queries(i, carry):
        d_query, *d_keys_values = carry
        q, g_rows = _get_block(query, i, block, 2), _get_block(g, i, block, 2)
        log, dot = _get_block(logs, i, block, 2), _get_block(g_dot_o, i, block, 2)
        visible_rows = _get_block(mask.visible, i, block, 1)

        def visit_keys(j, carry):
            d_q, d_key, d_value = carry
            k, v = _get_block(key, j, block, 1), _get_block(value, j, block, 1)
            visible = _get_block(visible_rows, j, block, 2)
            scores = _compute_scores(settings, q, k, visible)
            weights = jnp.exp(scores - log[..., None])  # p
            d_weights = einsum_f32("ngtd,nsd->ngts", g_rows, v)  # dp
            d_scores = weights * (d_weights - dot[..., None])  # ds
            if settings.soft_cap is not None:
                # Masked scores are not capped; their weights, and ds, are 0.
                capped = jnp.where(scores == _MASKED, 0, scores / settings.soft_cap)
                d_scores *= 1 - capped * capped
            d_scores = (d_scores * settings.scale).astype(query.dtype)
            weights = weights.astype(value.dtype)
            d_q += einsum_f32("ngts,nsd->ngtd", d_scores, k)
            d_k = einsum_f32("ngts,ngtd->nsd", d_scores, q)
            d_v = einsum_f32("ngts,ngtd->nsd", weights, g_rows)
            # Each block of keys sums its gradient over the blocks of queries.
            d_k = _get_block(d_key, j, block, 1) + d_k
            d_v = _get_block(d_value, j, block, 1) + d_v
            d_key = _set_block(d_key, d_k, j, block, 1)
            return d_q, d_key, _set_block(d_value, d_v, j, block, 1)

        start = jnp.zeros(q.shape, jnp.float32), *d_keys_values
        d_q, *d_keys_values = lax.fori_loop(
            mask.first[i], mask.stop[i], visit_keys, start
        )
        return _set_block(d_query, d_q, i, block, 2), *d_keys_values

    sums = [jnp.zeros(x.shape, jnp.float32) for x in (key, value)]
    start = jnp.zeros(query.shape, query.dtype), *sums
    d_query, d_key, d_value = lax.fori_loop(
        0, query.shape[2] // block, visit_queries, start
    )
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
