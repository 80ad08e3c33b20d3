"""A gated delta rule with a convolution, which replaces attention (arXiv:2412.06464).

Shapes: B batch, T tokens, H heads of values, N heads of keys, K size of a key, V size
of a value, C channels and W width of the convolution, S tokens of a chunk.
"""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from .attention import LayerData, SharedKV, TokenData
from .config import DecoderConfig, DeltaRule, LayerKind
from .products import linear_names, make_dense, name_product

CHUNK = 64  # tokens that are processed at once; a power of two
# The rule is computed in float32. By default, accelerators would round its operands.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class LayerStates(NamedTuple):
    """The cache of a stack of layers; its size does not grow with the sequence."""

    inputs: Float[Array, "L B W-1 C"]  # the last inputs of the convolution
    state: Float[Array, "L B H K V"]

    @property
    def length(self) -> int:
        """Zero, because the cache has no entries for individual positions."""
        return 0

    def grow(self, length: int) -> "LayerStates":
        """Returns the cache itself."""
        return self

    def write(self, new: "LayerStates", positions: Int[Array, "B T"]) -> "LayerStates":
        """Returns the new inputs and states, which replace the old ones."""
        return new


class GatedDeltaNet(nn.Module):
    """Mixes tokens by a gated delta rule.

    The rule depends on the order of the tokens in a row, but not on their positions.
    Each sequence of a packed row starts with a state of zeros.
    """

    config: DecoderConfig
    kinds: tuple[LayerKind, ...]  # of the layers in the stack
    dtype: DTypeLike = jnp.float32
    part_name: ClassVar[str] = "linear_attn"
    split_outputs: ClassVar = "in_proj_qkv", "in_proj_z"
    split_inputs: ClassVar[tuple[str, ...]] = ("out_proj",)

    @nn.compact
    def __call__(
        self, x, tokens: TokenData, layer_data: LayerData, cache, shared_kv: SharedKV
    ):
        """Returns the output, the new inputs and state, and the same `shared_kv`.

        The new inputs and state are None without a cache.
        """
        rule = delta_rule_of(self.kinds)
        # 1. Queries, keys and values, through a convolution and an activation.
        inputs = self._project(x, "qkv", rule.conv_channels)  # [B, T, C]
        gate = self._project(x, "z", rule.num_value_heads * rule.value_dim)
        shape = rule.conv_channels, 1, rule.conv_width
        weights = self.param("conv1d", nn.initializers.lecun_normal(), shape)[:, 0]
        old_inputs = None if cache is None else cache.inputs
        mixed = convolve(inputs, weights, tokens.segment_ids, old_inputs)
        query, key, value = split_heads(nn.silu(mixed).astype(self.dtype), rule)
        # 2. How much of the state each token keeps, and how strongly it is written.
        log_decay, strength = self._compute_gates(x, rule, tokens.num_tokens)
        # 3. The rule, followed by a norm of each head, a gate and an output projection.
        old_state = None if cache is None else cache.state
        y, state = gated_delta_rule(
            query, key, value, log_decay, strength, tokens.segment_ids, old_state
        )
        y = nn.RMSNorm(self.config.rms_norm_eps, self.dtype, name="norm")(y)
        y = y.reshape(gate.shape) * nn.silu(gate.astype(jnp.float32))
        project = make_dense(self.config.hidden_size, False, self.dtype, "out_proj")
        output, new_states = name_product(project(y.astype(self.dtype))), None
        if cache is not None:
            last = last_inputs(inputs, cache.inputs, tokens.num_tokens)
            new_states = LayerStates(last, state)
        return output, new_states, shared_kv

    def _project(self, x: Array, name: str, width: int) -> Array:
        return name_product(make_dense(width, False, self.dtype, f"in_proj_{name}")(x))

    def _compute_gates(
        self, x: Array, rule: DeltaRule, num_tokens: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """Returns two numbers for each token and head.

        The first is the logarithm of the factor by which the state decays. The second
        is the strength with which the token is written to the state.
        """
        heads, ones = rule.num_value_heads, nn.initializers.ones
        a, b = (self._project(x, n, heads).astype(jnp.float32) for n in "ab")
        log_rate, shift = (
            self.param(name, ones, (heads,)).astype(jnp.float32)[None, None]
            for name in ("A_log", "dt_bias")
        )
        log_decay = -jnp.exp(log_rate) * nn.softplus(a + shift)
        strength = nn.sigmoid(b)
        if num_tokens is not None:  # padding neither forgets nor writes
            is_token = jnp.arange(x.shape[1])[None] < num_tokens[:, None]
            log_decay = jnp.where(is_token[:, :, None], log_decay, 0)
            strength = jnp.where(is_token[:, :, None], strength, 0)
        return log_decay, strength

    @staticmethod
    def tensor_names(config: DecoderConfig, kind: LayerKind) -> dict[str, str]:
        """Returns the parameters' names in the Hugging Face layer, by path."""
        kernels = *(f"in_proj_{name}" for name in ("qkv", "z", "b", "a")), "out_proj"
        names = linear_names("linear_attn", dict.fromkeys(kernels, False))
        names |= {name: f"linear_attn.{name}" for name in ("A_log", "dt_bias")}
        names["conv1d"] = "linear_attn.conv1d.weight"
        return names | {"norm/scale": "linear_attn.norm.weight"}

    @staticmethod
    def init_cache(
        config: DecoderConfig,
        kinds: tuple[LayerKind, ...],
        batch: int,
        length: int,
        dtype: DTypeLike,
    ) -> LayerStates:
        """Returns zeros for the inputs and states of a stack of layers."""
        rule, stack = delta_rule_of(kinds), (len(kinds), batch)
        inputs = rule.conv_width - 1, rule.conv_channels
        state = rule.num_value_heads, rule.key_dim, rule.value_dim
        return LayerStates(
            jnp.zeros(stack + inputs, dtype), jnp.zeros(stack + state, jnp.float32)
        )


def delta_rule_of(kinds: tuple[LayerKind, ...]) -> DeltaRule:
    """Returns the settings of the rule, which are the same in all layers of a stack."""
    rule = kinds[0].delta_rule
    assert rule is not None
    return rule


def split_heads(
    x: Float[Array, "B T C"], rule: DeltaRule
) -> tuple[Array, Array, Array]:
    """Returns queries and keys `[B, T, N, K]`, and values `[B, T, H, V]`."""
    num_keys, rows = rule.num_key_heads * rule.key_dim, x.shape[:2]
    query, key, value = jnp.split(x, [num_keys, 2 * num_keys], axis=-1)
    query, key = (part.reshape(*rows, -1, rule.key_dim) for part in (query, key))
    return query, key, value.reshape(*rows, -1, rule.value_dim)


def convolve(
    x: Float[Array, "B T C"],
    weights: Float[Array, "C W"],
    segment_ids: Int[Array, "B T"] | None = None,
    old_inputs: Float[Array, "B W-1 C"] | None = None,
) -> Float[Array, "B T C"]:
    """Convolves each channel in float32. A token sees only its own sequence.

    `old_inputs` are the inputs before the row; None means zeros.
    """
    length, width = x.shape[1], weights.shape[1]
    if old_inputs is None:
        old_inputs = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    padded = jnp.concatenate([old_inputs.astype(jnp.float32), x], axis=1)
    result = jnp.zeros(x.shape, jnp.float32)
    for i in range(width):  # the input of `width - 1 - i` tokens ago
        shifted = padded[:, i : i + length]
        if segment_ids is not None:
            ids = jnp.pad(segment_ids, ((0, 0), (width - 1, 0)), constant_values=-1)
            is_same = ids[:, i : i + length] == segment_ids
            shifted = jnp.where(is_same[:, :, None], shifted, 0)
        result += shifted * weights[None, None, :, i].astype(jnp.float32)
    return result


def last_inputs(
    x: Float[Array, "B T C"],
    old_inputs: Float[Array, "B W-1 C"],
    num_tokens: Int[Array, " B"] | None,
) -> Float[Array, "B W-1 C"]:
    """Returns the last inputs of each row, for the cache.

    A row has `num_tokens` tokens, and padding after them; None means no padding.
    """
    inputs = jnp.concatenate([old_inputs, x.astype(old_inputs.dtype)], axis=1)
    if num_tokens is None:
        return inputs[:, x.shape[1] :]
    indices = num_tokens[:, None] + jnp.arange(old_inputs.shape[1])[None]
    return jnp.take_along_axis(inputs, indices[:, :, None], axis=1)


def gated_delta_rule(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B T N K"],
    value: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    strength: Float[Array, "B T H"],
    segment_ids: Int[Array, "B T"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Returns the outputs of the rule and the last state, computed in float32.

    Queries and keys are normalized first. Each head has a state, a matrix M `[K, V]`.
    The following steps are done for each token in order, with query q, key k and value
    v:

    1. M is multiplied by `exp(log_decay)`.
    2. The outer product of k and v - M^T k, multiplied by `strength`, is added to M.
    3. The output is M^T q / sqrt(K).

    The tokens of a chunk are processed at once. They see earlier chunks through the
    state, and each other through the inverse of a triangular matrix. If a chunk has
    only one token, as in decoding, the computation is the same as these three steps. A
    state of zeros precedes each sequence, by `segment_ids`; `state` precedes the first.
    """
    batch, length, heads, value_dim = value.shape
    size = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % size
    # 1. Split the tokens into chunks, [chunks, B, H, S, ...]. Padding writes nothing.
    query, key = (
        jnp.repeat(normalize(x.astype(jnp.float32)), heads // x.shape[2], axis=2)
        for x in (query, key)
    )

    def split(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x.astype(jnp.float32), widths)
        x = x.reshape(batch, -1, size, *x.shape[2:])  # [B, chunks, S, H, ...]
        return jnp.moveaxis(x, (1, 3), (0, 2))

    query = query * key.shape[-1] ** -0.5
    chunks = tuple(map(split, (query, key, value, log_decay, strength)))
    # 2. The index of each token's sequence in its row, [chunks, B, S].
    sequences = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        is_start = segment_ids[:, 1:] != segment_ids[:, :-1]
        sequences = jnp.pad(jnp.cumsum(is_start, axis=1), ((0, 0), (1, 0)))
    sequences = jnp.pad(sequences, ((0, 0), (0, padding)), mode="edge")
    sequences = sequences.reshape(batch, -1, size).swapaxes(0, 1)
    # 3. Process the chunks in order.
    if state is None:
        state = jnp.zeros((batch, heads, key.shape[-1], value_dim), jnp.float32)
    carry = state, jnp.zeros_like(sequences[0, :, 0])
    # The backward pass computes each chunk again. Otherwise, it would keep the matrices
    # of all chunks, which need more memory than anything else in a layer.
    process_chunk = jax.checkpoint(_process_chunk, prevent_cse=False)
    (state, _), outputs = lax.scan(process_chunk, carry, (*chunks, sequences))
    outputs = jnp.moveaxis(outputs, (0, 2), (1, 3))  # [B, chunks, S, H, V]
    return outputs.reshape(batch, -1, heads, value_dim)[:, :length], state


def normalize(x: Array) -> Array:
    """Scales the vectors along the last axis to length 1."""
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _process_chunk(carry, chunk):
    """Returns the state and the sequence's index after a chunk, and its outputs."""
    state, last_sequence = carry
    query, key, value, log_decay, strength, sequences = chunk
    # 1. factors[i, j]: the factor by which the state decays from token j to token i. It
    # is 0 if they belong to different sequences. Its logarithm is the sum of
    # `log_decay` over the tokens j + 1 to i. Subtracting two sums that begin at the
    # start of the chunk would be less exact, because these sums may be large.
    lower = jnp.tri(sequences.shape[1])
    up_to_i = log_decay[..., None, :] * lower[None, None]  # [B, H, i, k]
    sums = _einsum("bhik,kj->bhij", up_to_i, 1 - lower.T)  # 1 for k > j
    is_seen = (sequences[:, :, None] == sequences[:, None, :]) & (lower[None] == 1)
    factors = jnp.where(is_seen[:, None], jnp.exp(sums), 0)
    # The factors from the old state to token i, and from token i to the new state. They
    # are 0 if a new sequence starts in between.
    is_continued = (sequences == last_sequence[:, None])[:, None]  # [B, 1, S]
    is_last = (sequences == sequences[:, -1:])[:, None]
    total = jnp.cumsum(log_decay, axis=-1)  # [B, H, S]
    from_old = jnp.where(is_continued, jnp.exp(total), 0)[..., None]
    to_new = jnp.where(is_last, jnp.exp(sums[..., -1, :]), 0)[..., None]
    # 2. Token i writes `strength * (value - stored value)`, where the stored value is
    # what the state has for its key. It is the sum of an old value, from the state
    # before the chunk, and of what earlier tokens j of the chunk wrote. This gives
    # linear equations for the writes of all tokens:
    # writes[i] + sum_j overlaps[i, j] writes[j] = strength (value - old value).
    scaled_key = key * strength[..., None]
    overlaps = jnp.tril(_einsum("bhik,bhjk->bhij", scaled_key, key) * factors, -1)
    writes = value * strength[..., None]
    writes -= _einsum("bhik,bhkv->bhiv", scaled_key * from_old, state)
    writes = _einsum("bhij,bhjv->bhiv", invert_unit_lower(overlaps), writes)
    # 3. The outputs, and the new state.
    scores = _einsum("bhik,bhjk->bhij", query, key) * factors
    output = _einsum("bhij,bhjv->bhiv", scores, writes)
    output += _einsum("bhik,bhkv->bhiv", query * from_old, state)
    state = state * from_old[..., -1:, :]
    state += _einsum("bhjk,bhjv->bhkv", key * to_new, writes)
    return (state, sequences[:, -1]), output


def invert_unit_lower(x: Float[Array, "*batch S S"]) -> Float[Array, "*batch S S"]:
    """Returns the inverse of I + x, where x is strictly lower triangular.

    S is a power of two. The blocks on the diagonal are inverted: first those of size 1,
    then those of size 2, and so on. Each step joins two neighboring blocks A and D to
    one of twice the size: the inverse of [[A, 0], [C, D]] is [[A', 0], [-D' C A', D']],
    where A' and D' are the inverses of A and D. These matrix products can be split over
    a mesh, unlike a triangular solve.
    """
    size = x.shape[-1]
    inverse, width = jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), x.shape), 1
    while width < size:
        block = jnp.arange(size) // width
        row, column = block[:, None], block[None, :]
        is_c = (row == column + 1) & (row % 2 == 1)
        c = jnp.where(jnp.broadcast_to(is_c, x.shape), x, 0)
        product = _einsum("...ij,...jk->...ik", inverse, c)
        inverse -= _einsum("...ij,...jk->...ik", product, inverse)
        width *= 2
    return inverse
