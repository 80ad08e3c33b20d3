"""A decoder in Flax linen, which uses the library as any user would.

One `nn.scan` runs the layers of a group (see `groups`), so that their parameters have a
leading axis of L layers: `layers/self_attn/q_proj/kernel` is `[L, D, H * Dh]`.
Shapes: B batch, T tokens of this call, S keys in the cache, D hidden size, H query
heads, K key heads, Dh size of a head, R kinds of rotary positions, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import qlora_jax as ql

from .attention import (
    MASKED,
    NO_WINDOW,
    KeysAndValues,
    LayerData,
    SharedKV,
    TokenData,
    rotary_table,
)
from .config import DecoderConfig
from .constraints import split_embedded, split_head
from .delta_rule import LayerStates
from .groups import Group, Stack, layer_groups, layer_stacks
from .layer import Layer, mixer_class
from .per_layer_input import PerLayerEmbedding
from .products import einsum_f32, keep_products, make_dense, make_norm

ATTENTIONS = *MASKED, "splash"
# By path of a stack; () for layers that use the keys and values of earlier layers.
Cache = dict[str, KeysAndValues | LayerStates | tuple[()]]


class Period(nn.Module):
    """The layers of one period of a group, in order."""

    layer_class: type[Layer]
    config: DecoderConfig
    stacks: tuple[Stack, ...]
    settings: tuple[Any, ...]  # further arguments of `layer_class`

    @nn.compact
    def __call__(
        self, carry, tokens: TokenData, layer_data: tuple[LayerData, ...], cache
    ):
        """Returns the carry, and for each layer what is new in its cache."""
        new_entries = []
        for i, stack in enumerate(self.stacks):
            name = stack.path.rpartition("/")[2]
            layer = self.layer_class(
                self.config, stack.kinds, *self.settings, name=name
            )
            layer_cache = None if cache is None else cache[i]
            carry, new_entry = layer(carry, tokens, layer_data[i], layer_cache)
            new_entries.append(new_entry)
        return carry, tuple(new_entries)


class Decoder(nn.Module):
    """The language model.

    Attributes:
        config: Sizes, constants and parts.
        dtype: Dtype of the computation; norms, softmax and logits are float32.
        remat: Whether the backward pass recomputes each layer, to save memory. If not,
            products with kernels and the attention's result are saved. "offload"
            recomputes too, and saves the layers' inputs in host memory: see
            `qlora_jax.memory.offload_layer_inputs`.
        attention: How attention is computed without a cache. "xla" computes all scores
            at once, except that long inputs are processed in blocks on CPUs or with a
            soft-cap. "blocks" does so on all devices. On an ambient mesh with Explicit
            axes, both compute all scores at once. "cudnn" is the flash attention of
            cuDNN, for NVIDIA GPUs from Ampere on and dtypes of 16 bits; it supports
            neither soft-caps nor sinks. "splash" is
            `qlora_jax.memory.splash_attention`, for TPUs; on an ambient mesh with Auto
            axes, each device computes its rows and heads. A function with the same
            signature is also accepted. With a cache, attention is always "xla".
        stream_dtype: Dtype of the residual stream.
        mlp_tile: The maximum number of tokens of each sequence that the MLP processes
            at a time, to save memory; None for all. If set, adapters cannot have
            dropout.
        scanned: Patterns for the paths of the modules that run under `nn.scan`, for
            `qlora_jax.linen.wrap`.
        max_positions: None, because only models with learned positions limit the length
            of sequences, as some in PyTorch do.

    Example:
        >>> import jax
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model = Decoder(config)
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 5, 64)
    """

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool | Literal["offload"] = False
    attention: str | Callable[..., Array] = "xla"
    stream_dtype: DTypeLike = jnp.float32
    mlp_tile: int | None = None
    scanned: ClassVar[tuple[str, ...]] = (r"layers(_\d+)?",)
    max_positions: ClassVar[None] = None

    def __post_init__(self):
        if not callable(self.attention) and self.attention not in ATTENTIONS:
            raise ValueError(
                f"`attention` must be one of {ATTENTIONS} or a function. Got "
                f"{self.attention!r}."
            )
        c = self.config
        if self.attention == "cudnn" and (c.sinks or c.attention_soft_cap is not None):
            raise ValueError(
                "`attention` must not be cudnn for a model with a soft-cap or sinks of "
                "attention, which cuDNN does not support. Got cudnn. Use blocks."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        select: Int[Array, "B P"] | None = None,
        return_hidden: bool = False,
        segment_ids: Int[Array, "B T"] | None = None,
        num_tokens: Int[Array, " B"] | None = None,
    ) -> Any:
        """Computes float32 logits, and also the new cache if `cache` is given.

        Args:
            tokens: Token ids. Pad on the right: attention is causal, so that no token
                sees the padding after it.
            positions: Position of each token in its sequence; by default 0, 1, 2, ...
                in each segment. If `attention` is neither "xla" nor "blocks", or if
                layers have states, the order of tokens matters too. Rows whose
                positions do not count up by one in each segment then become NaN.
            cache: Keys, values and states of earlier calls, from `init_cache`. It needs
                room for all positions, since those beyond its length are not stored.
            select: Indices into T; return logits `[B, P, V]` of only these tokens.
            return_hidden: Return the normalized hidden states instead of logits.
            segment_ids: For each token, the sequence in its row that it belongs to.
                Tokens see only their own sequence, so that packed sequences have the
                same logits as in separate rows.
            num_tokens: With a cache, the number of tokens in each row; padding follows
                them, and must not change the states of layers. None for all.

        Returns:
            Logits `[B, T, V]`, or hidden states `[B, T, D]`. With a `cache`, a pair of
            these and the new cache.

        Raises:
            ValueError: If both `segment_ids` and `cache` are given, since each row of a
                cache is one sequence.
        """
        c = self.config
        if segment_ids is not None and cache is not None:
            raise ValueError("`segment_ids` must be None with a `cache`. Got both.")
        # 1. Embed the tokens. A residual stream in float32 is more exact. It is also
        # faster on CPUs, where XLA cannot update bfloat16 arrays: each time that the
        # scan saves a layer's input, XLA would convert the array of all saved inputs.
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, name="embed_tokens"
        )
        x = split_embedded(embed(tokens).astype(jnp.float32))
        if c.embedding_scale != 1:  # Gemma rounds this factor to its dtype
            x = x * jnp.asarray(c.embedding_scale, self.dtype).astype(jnp.float32)
        x = x.astype(self.stream_dtype)
        # "cudnn" is not in this list: it takes a mask that is made from positions, but
        # is also told that no query sees a later key of its row.
        needs_order = self.attention not in ("xla", "blocks") or c.has_states
        if positions is not None and cache is None and needs_order:
            in_order = are_in_order(positions, segment_ids)
            x = jnp.where(in_order[:, None, None], x, jnp.nan)
        # 2. Run the layers.
        token_data = describe_tokens(
            tokens.shape, c, positions, segment_ids, cache, num_tokens
        )
        layer_inputs = None
        if c.per_layer_width:
            name = PerLayerEmbedding.part_name
            layer_inputs = PerLayerEmbedding(c, self.dtype, name=name)(tokens, x)
        num_keys = tokens.shape[1] if cache is None else cache_length(cache)
        carry = x, empty_shared_kv(c, tokens.shape[0], num_keys, self.dtype)
        new_entries = {}
        for group in layer_groups(c):
            carry, group_entries = self._scan(
                group, carry, token_data, layer_inputs, cache
            )
            new_entries |= group_entries
        x, _ = carry
        # 3. Compute the logits of the selected tokens, or return their hidden states.
        if select is not None:
            x = jnp.take_along_axis(x, select[:, :, None], axis=1)  # [B, P, D]
        x = make_norm(c, self.dtype, "norm")(x)
        output = x if return_hidden else self._compute_logits(x, embed)
        if cache is None:
            return output
        # 4. Write what is new into the caches, for all layers of a stack at once.
        positions = token_data.positions
        new_cache = {
            path: old.write(new_entries[path], positions) if old else old
            for path, old in cache.items()
        }
        return output, new_cache

    @property
    def has_states(self) -> bool:
        """Whether layers have states, which cannot go back to an earlier token."""
        return self.config.has_states

    def init_cache(self, num_rows: int, length: int) -> Cache:
        """Returns an empty cache.

        Args:
            num_rows: B, the number of rows.
            length: The number of tokens that each row has room for.
        """
        return init_cache(self.config, num_rows, length)

    def _scan(
        self,
        group: Group,
        carry: tuple[Array, SharedKV],
        tokens: TokenData,
        layer_inputs: Float[Array, "L B T P"] | None,
        cache: Cache | None,
    ) -> tuple[tuple[Array, SharedKV], dict[str, Any]]:
        """Runs the layers of a group.

        Returns the carry, and what is new in the cache of each stack, by path.
        """
        policy = None if self.remat else keep_products
        if self.remat == "offload":
            policy = ql.memory.offload_layer_inputs()
        # XLA removes a loop that runs once. Without `prevent_cse`, it could then keep
        # results of the forward pass instead of recomputing them. If a period has
        # several layers, it could recompute the results of all layers at the start of
        # the period's backward pass, so that all of them are in memory.
        prevent_cse = group.repeats == 1 or len(group.stacks) > 1
        layer_class: Any = nn.remat(Layer, prevent_cse=prevent_cse, policy=policy)
        in_axes: Any = (nn.broadcast, 0, 0)  # of tokens, layer_data and cache
        scan = functools.partial(
            nn.scan,
            variable_axes={"params": 0, "router": 0},  # `router`: see experts.py
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=group.repeats,
            check_constancy_invariants=False,  # the check would trace the layer again
        )
        c, stacks = self.config, group.stacks
        settings = self.dtype, self.attention, self.mlp_tile
        layer_data = tuple(stack_layer_data(c, x, layer_inputs) for x in stacks)
        caches = None if cache is None else tuple(cache[x.path] for x in stacks)
        if len(stacks) == 1:  # a period of one layer needs no module of its own
            layer = scan(layer_class)(c, stacks[0].kinds, *settings, name=group.name)
            layer_cache = None if caches is None else caches[0]
            carry, new_entry = layer(carry, tokens, layer_data[0], layer_cache)
            return carry, {stacks[0].path: new_entry}
        period = scan(Period)(layer_class, c, stacks, settings, name=group.name)
        carry, new_entries = period(carry, tokens, layer_data, caches)
        paths = [stack.path for stack in stacks]
        return carry, dict(zip(paths, new_entries, strict=True))

    def _compute_logits(self, x, embed: nn.Embed) -> Float[Array, "B T V"]:
        c = self.config
        if c.tie_embeddings:
            logits = einsum_f32("btd,vd->btv", x, embed.embedding.astype(self.dtype))
        else:
            head = make_dense(c.vocab_size, False, self.dtype, "lm_head")
            logits = head(x).astype(jnp.float32)
        return ql.losses.soft_cap(logits, c.logit_soft_cap)


def stack_layer_data(
    config: DecoderConfig, stack: Stack, layer_inputs: Float[Array, "L B T P"] | None
) -> LayerData:
    """Returns the data of the layers of a stack, stacked on axis 0."""
    ropes, kinds, layers = config.ropes, stack.kinds, stack.layers
    rope = window = inputs = None
    if len({kind.rope for kind in kinds}) > 1:
        rope = jnp.array([ropes.index(kind.rope) for kind in kinds], jnp.int32)
    if len({kind.window for kind in kinds}) > 1:
        window = jnp.array([kind.window or NO_WINDOW for kind in kinds], jnp.int32)
    if layer_inputs is not None:
        inputs = layer_inputs[layers.start : layers.stop : layers.step]
    return LayerData(rope, window, inputs)


def are_in_order(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Bool[Array, " B"]:
    """Whether the positions of each row count up by one in each segment."""
    is_next = positions[:, 1:] == positions[:, :-1] + 1
    if segment_ids is not None:
        is_next |= segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.all(is_next, axis=1)


def head_arguments(
    config: DecoderConfig, params: dict, lora: dict | None = None
) -> dict[str, Any]:
    """Returns the arguments of `ql.losses.chunked_cross_entropy` for the head.

    Args:
        config: The decoder's config.
        params: The decoder's parameters, or the base tree.
        lora: The adapters, if any.

    Returns:
        The arguments `head` (the embedding `[V, D]` if it is tied, or the kernel
        `[D, V]` of `lm_head`, float or packed), `contract` and `logit_soft_cap`.

    Raises:
        ValueError: If the head is adapted or trained: the loss has no gradient for it.

    Example:
        >>> import jax
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model, tokens = Decoder(config), jnp.zeros((1, 5), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> hidden = model.apply({"params": params}, tokens, return_hidden=True)
        >>> losses = ql.losses.chunked_cross_entropy(
        ...     hidden, labels=tokens, **head_arguments(config, params))
        >>> losses.shape
        (1, 5)
    """
    name = "embed_tokens" if config.tie_embeddings else "lm_head"
    leaf = "embedding" if config.tie_embeddings else "kernel"
    head = params[name][leaf]
    if any(jax.tree.leaves(ql.lora_mask(head))) or (lora or {}).get(name):
        raise ValueError(
            f"`{name}/{leaf}` must be frozen and without an adapter, since the chunked "
            f"loss has no gradient for the head. Got one that is adapted or trained: "
            f"exclude `{name}` from the targets, or compute the loss on the logits."
        )
    if config.tie_embeddings and not ql.is_packed(head):
        head = split_head(head)
    return {
        "head": head,
        "contract": -1 if config.tie_embeddings else -2,
        "logit_soft_cap": config.logit_soft_cap,
    }


def describe_tokens(
    shape: tuple[int, ...],
    config: DecoderConfig,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    num_tokens: Int[Array, " B"] | None = None,
) -> TokenData:
    """Returns what layers know about the tokens of a call."""
    # 1. The position of each token in its segment: its index in the row, minus the
    # index at which the segment starts.
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
        if segment_ids is not None:
            is_start = segment_ids[:, 1:] != segment_ids[:, :-1]
            starts = jnp.where(is_start, positions[:, 1:], 0)
            starts = jnp.pad(starts, ((0, 0), (1, 0)))
            positions = positions - lax.cummax(starts, axis=1)
    # 2. The length of each token's sequence, on which LongRoPE's divisors depend.
    lengths = None
    if any(rope is not None and rope.long_divisors for rope in config.ropes):
        if cache is not None:
            # Cached keys are already rotated, so all calls must use the same length.
            lengths = cache_length(cache)
        elif segment_ids is None:
            lengths = jnp.max(positions, axis=1, keepdims=True) + 1
        else:
            is_same = segment_ids[:, :, None] == segment_ids[:, None, :]
            lengths = jnp.max(jnp.where(is_same, positions[:, None, :], 0), axis=2) + 1
    # 3. The rotary tables.
    dims = [config.dim_of(rope) for rope in config.ropes]
    tables = []
    for rope, dim in zip(config.ropes, dims, strict=True):
        table = rotary_table(positions, rope, dim, lengths)
        if padding := (max(dims) - dim) // 2:
            table = jnp.pad(table, [(0, 0)] * 4 + [(0, padding)])
        tables.append(table)
    return TokenData(positions, segment_ids, jnp.stack(tables), num_tokens)


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Returns an empty cache: zeros for the keys, values and states of all layers.

    Keys and values have `dtype`, and states are float32.
    """
    cache = {}
    for stack in layer_stacks(config):
        mixer = mixer_class(stack.kinds[0])
        cache[stack.path] = mixer.init_cache(config, stack.kinds, batch, length, dtype)
    return cache


def empty_shared_kv(
    config: DecoderConfig, batch: int, length: int, dtype: DTypeLike
) -> SharedKV:
    """Returns zeros for the keys and values that layers share."""
    shared_kv = {}
    for kind in config.layers:
        if kind.kv_group is not None:
            heads = config.heads_of(kind)
            shape = batch, length, heads.num_kv_heads, heads.head_dim
            shared_kv[kind.kv_group] = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return shared_kv


def grow_cache(cache: Cache, length: int) -> Cache:
    """Returns a cache with room for `length` positions."""
    return {path: x.grow(length) if x else x for path, x in cache.items()}


def cache_length(cache: Cache) -> int:
    """Returns the number of positions that a cache can hold."""
    return max(x.length for x in cache.values() if x)
