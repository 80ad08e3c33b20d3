"""Grouped-query attention with windows, segments, soft-caps and a cache."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int

import qlora_jax as ql

from .blockwise import BLOCK, attend_in_blocks
from .config import DecoderConfig
from .products import einsum_f32, keep, make_dense, make_norm
from .rotary import rotate
from .sharding import split_attention

MANY_QUERIES = 256  # from here on a CPU takes less time for blocks
NO_WINDOW = 2**31 - 1  # as data, for None


class Tokens(NamedTuple):
    """Positions, segments and rotary tables of the tokens of a call."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None  # None: one sequence a row
    tables: Float[Array, "R 2 B T 1 half"]  # one for each of `DecoderConfig.ropes`


class LayerScalars(NamedTuple):
    """One layer's kind as data, so that layers of several kinds are one scan."""

    # None where all layers have the same: then it is static.
    rope: Int[Array, "..."] | None = None  # index into `Tokens.tables`
    window: Int[Array, "..."] | None = None  # tokens that a query sees


def layer_scalars(config: DecoderConfig) -> LayerScalars:
    """Returns the scalars of all layers, stacked on axis 0."""
    ropes, kinds = config.ropes, config.layers
    rope = window = None
    if len(ropes) > 1:
        rope = jnp.array([ropes.index(kind.rope) for kind in kinds], jnp.int32)
    if len({kind.window for kind in kinds}) > 1:
        window = jnp.array([kind.window or NO_WINDOW for kind in kinds], jnp.int32)
    return LayerScalars(rope, window)


class Attention(nn.Module):
    """Causal grouped-query attention.

    "xla" and calls with a cache mask by position. Another `attention` masks by order in
    the row; `Decoder` sets rows to NaN where the two differ.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    attention: str | Callable[..., Any] = "xla"

    @nn.compact
    def __call__(self, x, tokens: Tokens, scalars: LayerScalars, cache):
        """Returns the output, and the new keys and values if there is a cache."""
        c = self.config
        query, key, value = self._project(x)
        if c.qk_norms:
            query, key = self._normalized(query, "q"), self._normalized(key, "k")
        sinks = None
        if c.sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,))
        table = tokens.tables[0 if scalars.rope is None else scalars.rope]
        operands = rotate(query, table), rotate(key, table), value, sinks
        if cache is None and self.attention != "xla":
            mixed, new = self._in_order(*operands, tokens, scalars), None
        else:
            mixed, new = self._by_matrix(*operands, tokens, scalars, cache)
        mixed = mixed.reshape(*x.shape[:2], -1)
        if self.attention != "splash" or cache is not None:
            mixed = keep(mixed)  # the kernel's result has a name already
        output = make_dense(c.hidden_size, c.o_bias, self.dtype, "o_proj")
        return keep(output(mixed)), new

    def _normalized(self, x: Float[Array, "B T _ Dh"], name: str) -> Array:
        norm = make_norm(self.config, self.dtype, f"{name}_norm")
        if self.config.qk_norms != "whole":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _in_order(
        self, query, key, value, sinks, tokens: Tokens, scalars: LayerScalars
    ):
        """Calls the user's or the splash attention, which take a static window."""
        c, attention = self.config, self.attention
        if isinstance(attention, str):
            attention = split_attention(ql.memory.splash_attention)
        run = functools.partial(
            attention,
            scale=c.attention_scale,
            soft_cap=c.attention_soft_cap,
            segment_ids=tokens.segment_ids,
            **({} if sinks is None else {"sinks": sinks}),
        )
        windows = [*dict.fromkeys(kind.window for kind in c.layers)]
        if scalars.window is None:
            return run(query, key, value, window=windows[0])
        index = jnp.array([window or NO_WINDOW for window in windows])
        index = jnp.argmax(index == scalars.window)
        kinds = [functools.partial(run, window=window) for window in windows]
        return jax.lax.switch(index, kinds, query, key, value)

    def _by_matrix(self, query, key, value, sinks, tokens: Tokens, scalars, cache):
        """Returns the result of `attend`, and the keys and values to cache."""
        c, new = self.config, None
        positions = key_positions = tokens.positions
        if cache is not None:
            # Each key is in the cache at its position. Padding after a prompt fills
            # positions that are overwritten before a query sees them.
            rows = jnp.arange(query.shape[0])[:, None]
            new = key.astype(cache[0].dtype), value.astype(cache[1].dtype)
            key, value = (
                old.at[rows, :, positions].set(x).swapaxes(1, 2).astype(self.dtype)
                for old, x in zip(cache, new, strict=True)
            )
            key_positions = jnp.arange(key.shape[1])[None]
        window = c.layers[0].window if scalars.window is None else scalars.window
        visible = positions[:, :, None] >= key_positions[:, None, :]
        if window is not None:
            visible &= positions[:, :, None] - key_positions[:, None, :] < window
        if (ids := tokens.segment_ids) is not None:
            visible &= ids[:, :, None] == ids[:, None, :]
        settings = {"scale": c.attention_scale, "soft_cap": c.attention_soft_cap}
        if sinks is not None:
            operands = with_sinks(query, key, value, visible, sinks / c.attention_scale)
            return attend(*operands, **settings)[..., : c.head_dim], new
        return attend(query, key, value, visible, **settings), new

    def _project(self, x) -> list[Float[Array, "B T _ Dh"]]:
        """Returns query, key and value, by heads."""
        c = self.config
        heads = c.num_heads, c.num_kv_heads, c.num_kv_heads
        widths = [count * c.head_dim for count in heads]
        dense = lambda width, name: make_dense(width, c.qkv_bias, self.dtype, name)
        project = lambda width, name: keep(dense(width, name)(x))
        if c.fused:
            whole = project(sum(widths), "qkv_proj")
            parts = jnp.split(whole, [widths[0], sum(widths[:2])], axis=-1)
        else:
            pairs = zip(widths, ("q_proj", "k_proj", "v_proj"), strict=True)
            parts = [project(width, name) for width, name in pairs]
        return [part.reshape(*x.shape[:2], -1, c.head_dim) for part in parts]


def with_sinks(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B S K Dh"],
    value: Float[Array, "B S K Dh"],
    visible: Bool[Array, "B T S"],
    sinks: Float[Array, " H"],
) -> tuple[Array, ...]:
    """Returns the operands of `attend` with one more key, whose product is the sink.

    Heads get one more value: the sink in queries, 1 in the new key, 0 in all others.
    The new key has a value of zeros, and all queries see it.
    """
    shape = *query.shape[:-1], 1
    of_query = jnp.broadcast_to(sinks.astype(query.dtype)[:, None], shape)
    query = jnp.concatenate([query, of_query], axis=-1)
    widths = ((0, 0), (0, 1), (0, 0), (0, 1))
    key, value = jnp.pad(key, widths), jnp.pad(value, widths)
    visible = jnp.pad(visible, ((0, 0), (0, 0), (0, 1)), constant_values=True)
    return query, key.at[:, -1, :, -1].set(1), value, visible


def attend(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B S K Dh"],
    value: Float[Array, "B S K Dh"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float,
    soft_cap: float | None = None,
) -> Float[Array, "B T H Dh"]:
    """Mixes the values that each query sees; H / K query heads share a key head."""
    operands = query, key, value, visible
    settings = {"scale": scale, "soft_cap": soft_cap}
    # Blocks are slices, which JAX does not take of axes split by type.
    mesh = getattr(jax.typeof(query).sharding, "mesh", None)
    is_split = mesh is not None and AxisType.Explicit in mesh.axis_types
    block = BLOCK if query.shape[1] > MANY_QUERIES and not is_split else None
    # JAX's attention has no soft-cap. On CPUs, plain products take less time.
    by_products = functools.partial(attend_by_matrices, block=block, **settings)
    if soft_cap is not None:
        return by_products(*operands)
    return jax.lax.platform_dependent(
        *operands,
        cpu=by_products,
        default=lambda query, key, value, visible: jax.nn.dot_product_attention(
            query, key, value, mask=visible[:, None], scale=scale
        ),
    )


def attend_by_matrices(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B S K Dh"],
    value: Float[Array, "B S K Dh"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float,
    soft_cap: float | None = None,
    block: int | None = None,
) -> Float[Array, "B T H Dh"]:
    """Computes `attend` by plain matrix products, one for each key head."""
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    query = query.swapaxes(1, 2).reshape(b * k, h // k, t, d)
    key, value = (x.swapaxes(1, 2).reshape(b * k, s, d) for x in (key, value))
    if block is not None:
        mixed = attend_in_blocks(query, key, value, visible, scale, soft_cap, block)
    else:
        # Rows have two axes: XLA on CPUs multiplies sums over both, those of the
        # gradients, in 16 bits, and sums over one in float32.
        scores = einsum_f32("ngtd,nsd->ngts", query, key) * scale
        scores = ql.losses.soft_cap(scores, soft_cap)
        by_row = scores.reshape(b, k, *scores.shape[1:])
        by_row = jnp.where(visible[:, None, None], by_row, -jnp.inf)
        weights = nn.softmax(by_row, axis=-1).astype(value.dtype).reshape(scores.shape)
        mixed = einsum_f32("ngts,nsd->ngtd", weights, value).astype(value.dtype)
    return mixed.reshape(b, h, t, d).swapaxes(1, 2)
