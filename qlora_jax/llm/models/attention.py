"""Grouped-query attention with rotary positions, windows, segments and a cache."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import qlora_jax as ql

from .blockwise import BLOCK, attend_in_blocks
from .config import DecoderConfig, LayerKind, Rope
from .constraints import split_attention
from .products import einsum_f32, linear_names, make_dense, make_norm, name_product

MANY_QUERIES = 256  # with more queries than this, blocks are faster on CPUs
# GPUs launch a few kernels for each pair of blocks, so larger blocks are faster there.
GPU_BLOCK = 256
# The values of `attention` that take a mask. `attend` implements them.
MASKED = "xla", "blocks", "cudnn"
NO_WINDOW = 2**31 - 1  # replaces None in arrays of windows


class TokenData(NamedTuple):
    """What layers know about the tokens of a call, besides their hidden states."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None  # None: each row is one sequence
    # The cosines and sines of `rotary_table` for each of `DecoderConfig.ropes`, padded
    # to the longest table. All heads share them: their axis has size 1.
    tables: Float[Array, "R 2 B T 1 half"]
    num_tokens: Int[Array, " B"] | None = None  # in each row; None: no padding


# Keys and values `[B, S, K, Dh]` of earlier layers, by `LayerKind.kv_group`.
SharedKV = dict[str, tuple[Array, Array]]


class KeysAndValues(NamedTuple):
    """The cache of a stack of layers with attention."""

    keys: Float[Array, "L B K S Dh"]
    values: Float[Array, "L B K S Dh"]

    @property
    def length(self) -> int:
        """The number of positions that there is room for."""
        return self.keys.shape[3]

    def grow(self, length: int) -> "KeysAndValues":
        """Returns a cache with room for `length` positions."""
        widths = [(0, 0)] * 3 + [(0, length - self.length), (0, 0)]
        return KeysAndValues(*(jnp.pad(x, widths) for x in self))

    def write(
        self, new_kv: tuple[Array, Array], positions: Int[Array, "B T"]
    ) -> "KeysAndValues":
        """Writes the new keys and values `[L, B, T, K, Dh]` of all layers at once."""
        rows = jnp.arange(positions.shape[0])[:, None]
        keys, values = (
            old.at[:, rows, :, positions].set(jnp.moveaxis(x, 0, 2))
            for old, x in zip(self, new_kv, strict=True)
        )
        return KeysAndValues(keys, values)


class LayerData(NamedTuple):
    """What differs between the layers of a stack, as arrays that a scan slices.

    If all layers of the stack have the same rotary positions or window, the field is
    None, and `LayerKind` has the value, which is then a constant of the program.
    """

    rope: Int[Array, "..."] | None = None  # index into `TokenData.tables`
    window: Int[Array, "..."] | None = None  # number of tokens that a query sees
    # The layer's additional input (see `per_layer_input`); None if layers have none.
    additional_input: Float[Array, "... B T P"] | None = None


def rotary_table(
    positions: Int[Array, "B T"],
    rope: Rope | None,
    dim: int,
    lengths: Int[Array, "B _"] | int | None = None,
) -> Float[Array, "2 B T 1 dim/2"]:
    """Returns the cosine and sine of each pair's angle, which is 0 without a `rope`.

    Rotary positions: RoPE, arXiv:2104.09864. `lengths` are the lengths of the tokens'
    sequences; they are needed only if there are `rope.long_divisors`.
    """
    half = dim // 2
    if rope is None:
        angle = jnp.zeros((*positions.shape, 1, half), jnp.float32)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    # Pair i is rotated by position * theta ** (-2 i / dim) / divisors[i].
    undivided = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency, long_frequency = (  # [1, 1, 1, half], to broadcast over B, T and heads
        (undivided / jnp.asarray(divisors or 1, jnp.float32))[None, None, None]
        for divisors in (rope.divisors, rope.long_divisors)
    )
    if rope.long_divisors:
        is_long = jnp.asarray(lengths) > rope.original_length
        is_long = jnp.broadcast_to(is_long, positions.shape)[:, :, None, None]
        frequency = jnp.where(is_long, long_frequency, frequency)
    if rope.num_pairs:  # the other pairs are not rotated
        is_rotated = (jnp.arange(half) < rope.num_pairs)[None, None, None]
        frequency = jnp.where(is_rotated, frequency, 0)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    table = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return table if rope.scale == 1 else table * rope.scale


def rotate(
    x: Float[Array, "B T H Dh"], table: Float[Array, "2 B T 1 half"]
) -> Float[Array, "B T H Dh"]:
    """Rotates the pairs (i, i + half) of each head; values after them do not change."""
    cos, sin = table
    half = cos.shape[-1]
    rotary, unrotated = x[..., : 2 * half], x[..., 2 * half :]
    low, high = jnp.split(rotary.astype(jnp.float32), 2, axis=-1)
    # Cast before the concatenation, not after it: XLA on CPUs writes its operands to
    # memory, and they are smaller after a cast to 16 bits.
    halves = low * cos - high * sin, high * cos + low * sin
    rotated = [part.astype(x.dtype) for part in halves]
    return jnp.concatenate([*rotated, unrotated], axis=-1)


class Attention(nn.Module):
    """Causal grouped-query attention.

    If `attention` is "xla" or "blocks", or if there is a cache, only the positions of
    tokens decide which keys a query sees. With other values of `attention`, even with
    "cudnn", which takes a mask too, a query never sees keys that come later in the row.
    `Decoder` then fills a row with NaN if its positions do not follow this order.
    """

    config: DecoderConfig
    kinds: tuple[LayerKind, ...]  # of the layers in the stack
    dtype: DTypeLike = jnp.float32
    attention: str | Callable[..., Array] = "xla"
    part_name: ClassVar[str] = "self_attn"
    # The projections whose outputs or inputs may be split over devices.
    split_outputs: ClassVar = "q_proj", "k_proj", "v_proj", "qkv_proj"
    split_inputs: ClassVar = ("o_proj",)

    @nn.compact
    def __call__(
        self, x, tokens: TokenData, layer_data: LayerData, cache, shared_kv: SharedKV
    ):
        """Returns the output, the new keys and values, and those that layers share.

        The new keys and values are for `KeysAndValues.write`, and None without a cache.
        """
        c, kind, new_kv = self.config, self.kinds[0], None
        query, *key_and_value = self._project(x)  # [B, T, heads, Dh] each
        gate = None
        if c.attention_gate:  # a head has its query and then its gate: [B, T, 2 H, Dh]
            query, gate = query[:, :, ::2], query[:, :, 1::2]
        if c.qk_norms:
            query = self._normalize(query, "q")
        table = self._select_table(tokens, layer_data)
        query = rotate(query, table)
        if kind.has_kv:
            key, value = key_and_value
            if c.qk_norms:
                key = self._normalize(key, "k")
            if c.value_norms:
                value = nn.RMSNorm(c.rms_norm_eps, self.dtype, use_scale=False)(value)
            key = rotate(key, table)
            if cache is not None:
                key, value, new_kv = self._join_cached(key, value, tokens, cache)
        else:
            assert kind.kv_group is not None  # the group shares keys and values
            key, value = shared_kv[kind.kv_group]
        if kind.kv_group is not None:
            shared_kv = {**shared_kv, kind.kv_group: (key, value)}
        is_cached = cache is not None
        mixed = self._attend(query, key, value, tokens, layer_data, is_cached)
        if gate is not None:
            gate = nn.sigmoid(gate.astype(jnp.float32)).reshape(mixed.shape)
            mixed = (mixed * gate).astype(mixed.dtype)
        output = make_dense(c.hidden_size, c.o_bias, self.dtype, "o_proj")
        return name_product(output(mixed)), new_kv, shared_kv

    def _select_table(
        self, tokens: TokenData, layer_data: LayerData
    ) -> Float[Array, "2 B T 1 half"]:
        c, rope = self.config, layer_data.rope
        if rope is None:
            rope = c.ropes.index(self.kinds[0].rope)
        # Cut off the padding. All layers of a stack rotate the same number of values.
        half = c.dim_of(self.kinds[0].rope) // 2
        return tokens.tables[rope][..., :half]

    def _attend(
        self, query, key, value, tokens: TokenData, layer_data: LayerData, is_cached
    ) -> Float[Array, "B T _"]:
        """Returns the result of attention, with the values of all heads in one axis."""
        c, sinks = self.config, None
        if c.sinks:
            sinks = self.param("sinks", nn.initializers.zeros, (c.num_heads,))
        operands = query, key, value, sinks, tokens, layer_data
        if is_cached or self.attention in MASKED:
            mixed = self._attend_with_mask(*operands, is_cached)
        else:
            mixed = self._attend_without_mask(*operands)
        mixed = mixed.reshape(*query.shape[:2], -1)  # [B, T, H * Dh]
        # The result of the splash kernel already has a name for checkpoint policies.
        if self.attention != "splash" or is_cached:
            mixed = name_product(mixed)
        return mixed

    def _project(self, x) -> list[Float[Array, "B T _ Dh"]]:
        c, heads = self.config, self.config.heads_of(self.kinds[0])
        dense = functools.partial(make_dense, use_bias=c.qkv_bias, dtype=self.dtype)
        num_queries = c.num_heads * (2 if c.attention_gate else 1)
        counts = num_queries, heads.num_kv_heads, heads.num_kv_heads
        widths = [num_heads * heads.head_dim for num_heads in counts]
        if c.fused:
            fused = name_product(dense(sum(widths), name="qkv_proj")(x))
            parts = jnp.split(fused, [widths[0], sum(widths[:2])], axis=-1)
        else:
            pairs = zip(widths, projections_of(c, self.kinds[0]), strict=False)
            parts = [name_product(dense(n, name=name)(x)) for n, name in pairs]
        if self.kinds[0].has_kv and heads.key_is_value:
            parts.append(parts[1])
        return [part.reshape(*x.shape[:2], -1, heads.head_dim) for part in parts]

    def _normalize(self, x: Float[Array, "B T _ Dh"], name: str) -> Array:
        norm = make_norm(self.config, self.dtype, f"{name}_norm")
        if self.config.qk_norms != "whole":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _attend_without_mask(
        self, query, key, value, sinks, tokens: TokenData, layer_data: LayerData
    ):
        """Calls splash attention or the user's function, which need static windows."""
        c, attention = self.config, self.attention
        if isinstance(attention, str):
            attention = split_attention(ql.memory.splash_attention)
        attend_window = functools.partial(
            attention,
            scale=c.attention_scale,
            soft_cap=c.attention_soft_cap,
            segment_ids=tokens.segment_ids,
            **({} if sinks is None else {"sinks": sinks}),
        )
        windows = [*dict.fromkeys(kind.window for kind in self.kinds)]
        if layer_data.window is None:
            return attend_window(query, key, value, window=windows[0])
        # The window of this layer is traced: switch between one branch per window.
        sizes = jnp.array([window or NO_WINDOW for window in windows])
        index = jnp.argmax(sizes == layer_data.window)
        branches = [functools.partial(attend_window, window=w) for w in windows]
        return jax.lax.switch(index, branches, query, key, value)

    def _join_cached(
        self, key: Array, value: Array, tokens: TokenData, cache: KeysAndValues
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        """Returns the cached keys and values with the new ones, and the new ones alone.

        The cache itself does not change: `KeysAndValues.write` adds the new ones of all
        layers after the scan. Padding after a prompt is overwritten before a query sees
        it.
        """
        rows = jnp.arange(key.shape[0])[:, None]
        new_kv = key.astype(cache[0].dtype), value.astype(cache[1].dtype)
        key, value = (  # [B, K, S, Dh] in the cache, [B, S, K, Dh] here
            old.at[rows, :, tokens.positions].set(x).swapaxes(1, 2).astype(self.dtype)
            for old, x in zip(cache, new_kv, strict=True)
        )
        return key, value, new_kv

    def _attend_with_mask(
        self, query, key, value, sinks, tokens: TokenData, layer_data, is_cached: bool
    ) -> Array:
        c, kind, positions = self.config, self.kinds[0], tokens.positions
        implementation = "xla" if is_cached else str(self.attention)
        key_positions = jnp.arange(key.shape[1])[None] if is_cached else positions
        # 1. The mask [B, T, S].
        window = kind.window if layer_data.window is None else layer_data.window
        visible = positions[:, :, None] >= key_positions[:, None, :]
        if window is not None:
            visible &= positions[:, :, None] - key_positions[:, None, :] < window
        if (ids := tokens.segment_ids) is not None:
            visible &= ids[:, :, None] == ids[:, None, :]
        # 2. Attention. `attend` multiplies all scores by the scale, but sinks are final
        # scores, so divide them by the scale.
        settings: dict[str, Any] = {"scale": c.attention_scale}
        settings |= {"soft_cap": c.attention_soft_cap, "implementation": implementation}
        if sinks is not None:
            operands = with_sinks(query, key, value, visible, sinks / c.attention_scale)
            return attend(*operands, **settings)[..., : query.shape[-1]]
        return attend(query, key, value, visible, **settings)

    @staticmethod
    def tensor_names(config: DecoderConfig, kind: LayerKind) -> dict[str, str]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        c = config
        has_bias = dict.fromkeys(projections_of(c, kind), c.qkv_bias)
        has_bias["o_proj"] = c.o_bias
        names = linear_names("self_attn", has_bias)
        if c.qk_norms:
            norms = ("q_norm", "k_norm") if kind.has_kv else ("q_norm",)
            names |= {f"{norm}/scale": f"self_attn.{norm}.weight" for norm in norms}
        return names | ({"sinks": "self_attn.sinks"} if c.sinks else {})

    @staticmethod
    def init_cache(
        config: DecoderConfig,
        kinds: tuple[LayerKind, ...],
        batch: int,
        length: int,
        dtype: DTypeLike,
    ) -> KeysAndValues | tuple[()]:
        """Returns zeros for the keys and values of a stack; () for one without them."""
        if not kinds[0].has_kv:
            return ()
        # Heads come before positions, as in the products of attention. Otherwise, XLA
        # on CPUs would transpose the whole cache for each new token.
        heads = config.heads_of(kinds[0])
        shape = len(kinds), batch, heads.num_kv_heads, length, heads.head_dim
        return KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def projections_of(config: DecoderConfig, kind: LayerKind) -> tuple[str, ...]:
    """Returns the names of the projections of a layer's queries, keys and values."""
    if config.fused:
        return ("qkv_proj",)
    if not kind.has_kv:
        return ("q_proj",)
    names = "q_proj", "k_proj", "v_proj"
    return names[:2] if config.heads_of(kind).key_is_value else names


def with_sinks(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B S K Dh"],
    value: Float[Array, "B S K Dh"],
    visible: Bool[Array, "B T S"],
    sinks: Float[Array, " H"],
) -> tuple[Array, ...]:
    """Adds a key to the operands of `attend`; its products with queries are the sinks.

    Queries and keys get one more entry: in a query, the sink of its head; in the new
    key, 1; in all other keys, 0. The new key has a value of zero, and all queries see
    it.
    """
    shape = *query.shape[:-1], 1
    sink_column = jnp.broadcast_to(sinks.astype(query.dtype)[:, None], shape)
    query = jnp.concatenate([query, sink_column], axis=-1)  # [B, T, H, Dh + 1]
    widths = ((0, 0), (0, 1), (0, 0), (0, 1))
    key, value = jnp.pad(key, widths), jnp.pad(value, widths)  # [B, S + 1, K, Dh + 1]
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
    implementation: str = "xla",
) -> Float[Array, "B T H Dh"]:
    """Computes masked attention, in which H / K query heads share a key head.

    With "cudnn", no query may see a later key, and there must be no soft-cap.
    """
    if implementation == "cudnn":
        # cuDNN adds the mask to the scores of each block, in 16 bits. It skips blocks
        # only if it knows that the mask is causal.
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=visible[:, None],
            scale=scale,
            is_causal=True,
            implementation="cudnn",
        )
    has_blocks = implementation == "blocks" or query.shape[1] > MANY_QUERIES
    # Blocks are slices, which JAX does not support along axes that an Explicit mesh
    # splits.
    mesh = getattr(jax.typeof(query).sharding, "mesh", None)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        has_blocks = False
    attend_plain = functools.partial(attend_by_matrices, scale=scale, soft_cap=soft_cap)
    block, gpu_block = (BLOCK, GPU_BLOCK) if has_blocks else (None, None)
    operands = query, key, value, visible
    if implementation == "xla" and soft_cap is not None:
        return attend_plain(*operands, block=block)  # JAX's attention has no soft-cap

    def attend_off_cpu(query, key, value, visible):
        if implementation == "blocks":
            return attend_plain(query, key, value, visible, block=gpu_block)
        return jax.nn.dot_product_attention(
            query, key, value, mask=visible[:, None], scale=scale
        )

    # Plain products are faster on CPUs than JAX's attention.
    attend_on_cpu = functools.partial(attend_plain, block=block)
    return jax.lax.platform_dependent(
        *operands, cpu=attend_on_cpu, default=attend_off_cpu
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
    """Computes `attend` with plain products, in blocks unless `block` is None."""
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    # Merge the axes B and K into one batch axis N. The query then is [N, H / K, T, Dh],
    # and key and value are [N, S, Dh].
    query = query.swapaxes(1, 2).reshape(b * k, h // k, t, d)
    key, value = (x.swapaxes(1, 2).reshape(b * k, s, d) for x in (key, value))
    if block is not None:
        mixed = attend_in_blocks(query, key, value, visible, scale, soft_cap, block)
    else:
        # The gradients of key and value are sums over two axes, g and t. XLA on CPUs
        # would compute sums over more than one axis in 16 bits; `einsum_f32` computes
        # them in float32.
        scores = einsum_f32("ngtd,nsd->ngts", query, key) * scale  # [N, H / K, T, S]
        scores = ql.losses.soft_cap(scores, soft_cap)
        by_row = scores.reshape(b, k, *scores.shape[1:])  # [B, K, H / K, T, S]
        by_row = jnp.where(visible[:, None, None], by_row, -jnp.inf)
        weights = nn.softmax(by_row, axis=-1).astype(value.dtype).reshape(scores.shape)
        mixed = einsum_f32("ngts,nsd->ngtd", weights, value).astype(value.dtype)
    return mixed.reshape(b, h, t, d).swapaxes(1, 2)  # [B, T, H, Dh]
