"""A Llama-family decoder in Flax linen, written as a user of the library would.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied or untied head. The
layers run under one `nn.scan`, so every parameter of a layer has the layers on
axis 0: `layers/self_attn/q_proj/kernel` is `[L, D, H * Dh]`. Nothing here knows about
quantization: `qlora_jax.linen.wrap` finds the seven `nn.Dense` kernels, and takes the
paths of the scanned modules: `wrap(model, scanned=model.scanned)`.

Terms: B batch, T tokens of this call, S keys seen, D hidden size, H heads, G query
heads for each key head, Dh size of a head, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

Dtype = Any
Cache = tuple[Float[Array, "L B S K Dh"], Float[Array, "L B S K Dh"]]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder.

    Attributes:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the SwiGLU block.
        num_layers: Number of layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Size of one head.
        rope_theta: Base of the rotary frequencies.
        rope_divisors: What each rotary frequency is divided by (Llama 3.1 stretches
            the slow ones); empty for 1.
        rms_norm_eps: Added to the mean square.
        tie_embeddings: Whether the head is the embedding, transposed.
        qkv_bias: Whether q, k and v have a bias.
        o_bias: Whether the output projection has one.
        mlp_bias: Whether the SwiGLU projections have one.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> config.head_dim
        8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    rope_theta: float = 10_000.0
    rope_divisors: tuple[float, ...] = ()
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "`num_kv_heads` must divide `num_heads`. "
                f"Got {self.num_kv_heads=}, {self.num_heads=}."
            )
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)


def einsum_f32(spec: str, a: Array, b: Array) -> Float[Array, "..."]:
    """Returns `jnp.einsum(spec, a, b)`, accumulated and returned in float32.

    The gradients are accumulated in float32 too, from operands in their own dtype.
    Autodiff would multiply a float32 cotangent by a bfloat16 operand, which hardware
    with bfloat16 matrix units cannot do fast.
    """
    return _einsum(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(spec, a, b) -> Any:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _einsum_fwd(spec, a, b):
    return _einsum(spec, a, b), (a, b)


def _einsum_bwd(spec, residuals, g):
    a, b = residuals
    ins, out = spec.split("->")
    left, right = ins.split(",")
    g = g.astype(a.dtype)
    da: Any = _einsum(f"{out},{right}->{left}", g, b)
    db: Any = _einsum(f"{left},{out}->{right}", a, g)
    return da.astype(a.dtype), db.astype(b.dtype)


_einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _dense_dot(x, kernel, dims, precision=None, **unused):
    """What `nn.Dense` calls as `dot_general`: `[B, T, K] @ [K, N]`, in `x.dtype`."""
    del dims, precision, unused
    return einsum_f32("btk,kn->btn", x, kernel).astype(x.dtype)


def rotary_table(
    positions: Int[Array, "B T"], config: DecoderConfig
) -> Float[Array, "2 B T 1 Dh/2"]:
    """Returns cosine and sine of each pair's angle, which grows with position."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_divisors:
        frequency = frequency / jnp.asarray(config.rope_divisors, jnp.float32)
    angle = (
        positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    )
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rotate(
    x: Float[Array, "B T H Dh"], table: Float[Array, "2 B T 1 Dh/2"]
) -> Float[Array, "B T H Dh"]:
    """Turns the pairs (i, i + Dh/2) of each head."""
    cos, sin = table
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [low * cos - high * sin, high * cos + low * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention; what a query sees is decided by positions."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, positions, table, cache):
        """Returns the mixed values and the layer's new cache."""
        c = self.config
        dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general=_dense_dot)

        def heads(name, count):
            y = dense(count * c.head_dim, use_bias=c.qkv_bias, name=name)(x)
            return y.reshape(*x.shape[:2], count, c.head_dim)

        query = rotate(heads("q_proj", c.num_heads), table)
        key = rotate(heads("k_proj", c.num_kv_heads), table)
        value = heads("v_proj", c.num_kv_heads)
        key_positions = positions
        if cache is not None:
            # Each key is in the cache at its position. Padding after a prompt fills
            # positions that are overwritten before a query sees them.
            rows = jnp.arange(x.shape[0])[:, None]
            new = key.astype(cache[0].dtype), value.astype(cache[1].dtype)
            cache = tuple(
                old.at[rows, positions].set(x)
                for old, x in zip(cache, new, strict=True)
            )
            key, value = (x.astype(self.dtype) for x in cache)
            key_positions = jnp.arange(key.shape[1])[None]
        visible = positions[:, :, None] >= key_positions[:, None, :]
        mixed = attend(query, key, value, visible).reshape(*x.shape[:2], -1)
        return dense(c.hidden_size, use_bias=c.o_bias, name="o_proj")(mixed), cache


def attend(
    query: Float[Array, "B T H Dh"],
    key: Float[Array, "B S K Dh"],
    value: Float[Array, "B S K Dh"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B T H Dh"]:
    """Mixes the values that each query sees; H / K query heads share a key head.

    The products are over plain matrices, one for each key head, which a CPU multiplies
    three times faster than the same einsum on `[B, T, H, Dh]`.
    """
    b, t, h, d = query.shape
    s, k = key.shape[1:3]
    query = query.reshape(b, t, k, h // k, d).transpose(0, 2, 3, 1, 4)
    query = query.reshape(b * k, h // k * t, d)
    key = key.swapaxes(1, 2).reshape(b * k, s, d)
    value = value.swapaxes(1, 2).reshape(b * k, s, d)
    scores = einsum_f32("nqd,nsd->nqs", query, key) / math.sqrt(d)
    scores = scores.reshape(b, k, h // k, t, s)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(b * k, h // k * t, s)
    mixed = einsum_f32("nqs,nsd->nqd", weights, value).astype(value.dtype)
    mixed = mixed.reshape(b, k, h // k, t, d).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(b, t, h, d)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        """Returns the block's output, without the residual."""
        c = self.config
        dense = functools.partial(
            nn.Dense, use_bias=c.mlp_bias, dtype=self.dtype, dot_general=_dense_dot
        )
        gate = dense(c.intermediate_size, name="gate_proj")(x)
        up = dense(c.intermediate_size, name="up_proj")(x)
        gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
        product = (nn.silu(gate) * up).astype(self.dtype)
        return dense(c.hidden_size, name="down_proj")(product)


class Layer(nn.Module):
    """Attention and SwiGLU, each on a normalized copy, added to the residual stream."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, positions, table, cache):
        """Returns the residual stream and the layer's new cache."""
        c, dtype = self.config, self.dtype
        norm = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_eps, dtype=dtype)
        y, cache = Attention(c, dtype, name="self_attn")(
            norm(name="input_layernorm")(x), positions, table, cache
        )
        x = x + y
        x = x + SwiGLU(c, dtype, name="mlp")(norm(name="post_attention_layernorm")(x))
        return x, cache


class Decoder(nn.Module):
    """The language model.

    Attributes:
        config: Shapes and constants.
        dtype: Dtype of the computation; norms, softmax and logits are float32.
        remat: Whether the backward pass recomputes each layer, for less memory.
        scanned: Paths of the modules that run under `nn.scan`.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> model = Decoder(config)
        >>> tokens = jnp.zeros((1, 5), jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> model.apply(variables, tokens).shape
        (1, 5, 64)
    """

    config: DecoderConfig
    dtype: Dtype = jnp.float32
    remat: bool = False
    scanned: ClassVar[tuple[str, ...]] = ("layers",)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        select: Int[Array, "B P"] | None = None,
        return_hidden: bool = False,
    ):
        """Returns float32 logits, and the new cache where one was given.

        Args:
            tokens: Token ids. Pad on the right: no query looks to its right.
            positions: Place of each token in its sequence; 0, 1, 2, ... by default.
            cache: Keys and values of earlier calls, from `init_cache`.
            select: Indices into T; logits `[B, P, V]` of these tokens only.
            return_hidden: Return the normalized hidden states in the logits' place.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[1])[None], tokens.shape
            )
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, name="embed_tokens"
        )
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        in_axes: Any = (nn.broadcast, nn.broadcast, 0)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,  # positions, table, cache
            length=c.num_layers,
        )(c, self.dtype, name="layers")
        table = rotary_table(positions, c)
        # The residual stream is float32. It is more exact, and XLA on CPUs has no
        # bfloat16 updates: each time the scan saves a layer's input, it would convert
        # the whole stack of them.
        x = embed(tokens).astype(jnp.float32)
        x, new_cache = layers(x, positions, table, cache)
        if select is not None:
            x = jnp.take_along_axis(x, select[:, :, None], axis=1)
        x = nn.RMSNorm(epsilon=c.rms_norm_eps, dtype=self.dtype, name="norm")(x)
        if return_hidden:
            out = x
        elif c.tie_embeddings:
            out = einsum_f32("btd,vd->btv", x, embed.embedding.astype(self.dtype))
        else:
            head = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                dot_general=_dense_dot,
                name="lm_head",
            )
            out = head(x).astype(jnp.float32)
        return out if cache is None else (out, new_cache)


def init_cache(
    config: DecoderConfig, batch: int, length: int, dtype: Dtype = jnp.float32
) -> Cache:
    """Returns an empty cache for `length` positions.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> init_cache(config, batch=3, length=7)[0].shape
        (2, 3, 7, 2, 8)
    """
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
