"""Losses that never hold the logits of all tokens.

The logits, float32 `[tokens, V]`, are often the largest array of a training step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from .._jax.modes import call_in_auto_mode, varying_with
from .._jax.specs import spec_of
from ..adapters.product import adapted_product
from ..matmul.backends.reference import accumulator_dtype, dot
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel, is_kernel

# Bytes of a chunk's logits, and the fewest tokens of a chunk: each chunk reads the
# entire head, and with fewer rows a product waits for memory.
CHUNK_BYTES, FEWEST_TOKENS = 64 * 2**20, 256
# Gradients in logits are multiplied by this before they are cast: float16 has no normal
# numbers below 6e-5, where most probabilities are. A power of two changes no bits else.
GRADIENT_SCALE = 1024.0


def chunked_cross_entropy(
    hidden: Float[Array, "*tokens D"],
    head: Float[Array, "_ _"] | Kernel,
    labels: Int[Array, "*tokens"],
    *,
    contract: int = -1,
    chunk_size: int | None = None,
    logit_soft_cap: float | None = None,
) -> Float[Array, "*tokens"]:
    """Returns each token's cross entropy in nats, from hidden states and the head.

    It equals optax's `softmax_cross_entropy_with_integer_labels` of the logits, and
    holds the logits of `chunk_size` tokens at a time. The head is frozen: only `hidden`
    gets a gradient, which the forward pass computes while it has the logits.

    Weigh the losses to mask tokens: `jnp.sum(losses * weights) / jnp.sum(weights)`. A
    label outside 0 to V - 1, such as -100, gives a loss and a gradient of NaN. Give
    such a token any label in the vocabulary, and a weight of 0.

    The head is cast to the dtype of `hidden`, and products are summed in float32;
    softmax and losses are float32. The logits of a packed head are those of `matmul`,
    rounded to the dtype of `hidden`.

    Args:
        hidden: The hidden states after the last norm.
        head: The head's weights: `[V, D]`, such as those of an embedding, or `[D, V]`,
            such as a dense layer's kernel; a float array, or a kernel of any kind.
        labels: The right token of each hidden state.
        contract: The axis of the head that is contracted: -1 for `[V, D]`, -2 for
            `[D, V]`. Ignored for a kernel.
        chunk_size: The most tokens whose logits are held at once. By default as many as
            have logits of 64 MiB, and at least 256.
        logit_soft_cap: Bound of the logits, as in `soft_cap`; None for no bound.

    Raises:
        TypeError: If `hidden` or `head` is not floating-point, or `labels` are not
            integers.
        ValueError: If the shapes do not fit, if `contract` is neither -1 nor -2, if
            `chunk_size` or `logit_soft_cap` is not positive, or if the head is
            differentiated.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> hidden, head = jnp.ones((2, 3, 8)), jnp.ones((32, 8))
        >>> labels = jnp.zeros((2, 3), jnp.int32)
        >>> losses = ql.losses.chunked_cross_entropy(hidden, head, labels, chunk_size=4)
        >>> losses.shape, bool(jnp.allclose(losses, jnp.log(32)))
        ((2, 3), True)
        >>> packed = ql.quantize(head.T)  # a kernel [D, V]
        >>> loss = lambda x: ql.losses.chunked_cross_entropy(x, packed, labels).mean()
        >>> jax.grad(loss)(hidden).shape
        (2, 3, 8)
    """
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    geometry = Geometry("nk" if contract == -1 else "kn")
    kernel = head if is_kernel(head) else as_kernel(jnp.asarray(head), geometry)
    _check(hidden, kernel, labels, contract)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be positive. Got {chunk_size}.")
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"`logit_soft_cap` must be positive. Got {logit_soft_cap}.")
    if chunk_size is None:
        width = 4 * max(kernel.matrix_shape[-1], 1)
        chunk_size = max(CHUNK_BYTES // width, FEWEST_TOKENS)
    if labels.dtype.itemsize < 4:  # words are compared in the labels' dtype
        labels = labels.astype(jnp.int32)
    settings = _LossSettings(chunk_size, logit_soft_cap)
    return _losses(settings, varying_with(hidden, kernel, labels), kernel, labels)


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Returns `cap * tanh(logits / cap)` (Gemma 2, Gemma Team 2024, section 2).

    Args:
        logits: Values to bound.
        cap: Their bound; None for no bound.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.soft_cap(jnp.array([-1000.0, 0.0, 1000.0]), 30.0)
        Array([-30.,   0.,  30.], dtype=float32)
    """
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _LossSettings:
    """The static arguments of `chunked_cross_entropy`."""

    chunk_size: int
    soft_cap: float | None


def _check(hidden: Array, head: Kernel, labels: Array, contract: int) -> None:
    for name, x, kind in (
        ("hidden", hidden, jnp.floating),
        ("head", head, jnp.floating),
        ("labels", labels, jnp.integer),
    ):
        if not jnp.issubdtype(x.dtype, kind):
            raise TypeError(f"`{name}` must be {kind.__name__}. Got {x.dtype}.")
    if contract not in (-1, -2):
        raise ValueError(f"`contract` must be -1 or -2. Got {contract}.")
    if head.ndim != 2:
        raise ValueError(f"`head` must have two axes. Got shape {head.shape}.")
    width = head.matrix_shape[-2]
    if not hidden.ndim or hidden.shape[-1] != width:
        raise ValueError(
            f"`hidden` must have shape [..., {width}], as the head has. Got "
            f"{hidden.shape}, and a head {head.shape} with `contract={contract}`."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {hidden.shape[:-1]}, that of the tokens of "
            f"`hidden`. Got {labels.shape}."
        )


# With logits l of a token, c = cap * tanh(l / cap) and its label y,
#   loss = log(sum_j exp(c_j)) - c_y,
#   d loss / d l_j = (softmax(c)_j - [j = y]) * (1 - (c_j / cap)^2).
# A loss depends on its own row of `hidden` alone. So the forward pass keeps
# `unit = d loss / d hidden`, `[*tokens, D]`, and the backward pass is `g * unit`.
@jax.custom_vjp
def _losses(settings: _LossSettings, hidden: Array, head: Any, labels: Array) -> Array:
    return _compute(settings, hidden, head, labels, has_gradient=False)[0]


def _losses_fwd(
    settings: _LossSettings, hidden: Any, head: Any, labels: Any
) -> tuple[Array, tuple]:
    is_primal = lambda leaf: hasattr(leaf, "perturbed")
    if any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=is_primal)):
        raise ValueError(
            "`head` must be frozen: it gets no gradient. Got one that is "
            "differentiated. Pass `jax.lax.stop_gradient(head)`; to train it, compute "
            "the loss on the logits."
        )
    hidden, head, labels = jax.tree.map(
        lambda leaf: leaf.value, (hidden, head, labels), is_leaf=is_primal
    )
    return _compute(settings, hidden, head, labels, has_gradient=True)


def _losses_bwd(unit: Array, g: Any) -> tuple[None, Array, None, None]:
    g = jnp.expand_dims(g, -1)
    return None, (unit * g).astype(unit.dtype), None, None


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnames="has_gradient")
def _compute(
    settings: _LossSettings, hidden: Array, head: Any, labels: Array, has_gradient: bool
) -> tuple[Array, Array | None]:
    """Returns the losses and, if asked, the gradient of each in its hidden state."""
    run = functools.partial(_by_chunks, settings, has_gradient)
    spec = spec_of(hidden)
    specs = PartitionSpec(*spec[:-1]), PartitionSpec(*spec) if has_gradient else None
    return call_in_auto_mode(run, lambda _: specs, hidden, head, labels)


def _by_chunks(
    settings: _LossSettings, has_gradient: bool, hidden: Array, head: Any, labels: Array
) -> tuple[Array, Array | None]:
    linear = _linear(head, hidden.dtype)
    one = functools.partial(_chunk, linear, settings.soft_cap, has_gradient)
    count = _num_chunks(labels.size, settings.chunk_size)
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if count == 1:
        losses, unit = one((rows, targets))
    else:
        losses, unit = lax.map(one, (_cut(rows, count), _cut(targets, count)))
        losses = _join(losses, labels.size)
        unit = unit if unit is None else _join(unit, labels.size)
    losses = losses.reshape(labels.shape)
    return losses, unit if unit is None else unit.reshape(hidden.shape)


def _num_chunks(tokens: int, chunk_size: int) -> int:
    """Returns the number of equal chunks; prefers one that divides the tokens."""
    fewest = max(-(-tokens // chunk_size), 1)
    for count in range(fewest, min(2 * fewest, tokens + 1)):
        if tokens % count == 0:
            return count
    return fewest


def _cut(x: Array, count: int) -> Array:
    """Returns rows `[tokens, ...]` as padded chunks `[count, tokens / count, ...]`."""
    # Every `count`-th row is in one chunk: each chunk has rows of every device.
    if rest := -x.shape[0] % count:
        x = jnp.pad(x, [(0, rest)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, tokens: int) -> Array:
    """Inverts `_cut`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _linear(head: Kernel, dtype: Any) -> Callable:
    """Returns a function from rows to logits and the pull-back of the logits."""
    wide = accumulator_dtype(dtype)
    if head.packing is not None:

        def packed(x: Array) -> tuple[Array, Callable]:
            logits, pull = jax.vjp(lambda x: adapted_product(x, head), x)
            return logits.astype(wide), lambda d: pull(d)[0].astype(wide)

        return packed
    w, is_embedding = head.value.astype(dtype), head.geometry.kinds == "nk"

    def dense(x: Array) -> tuple[Array, Callable]:
        product = functools.partial(dot, w=w, precision=None)
        logits = product(x, transpose=is_embedding)
        return logits, lambda d: product(d, transpose=not is_embedding)

    return dense


def _chunk(
    linear: Callable, cap: float | None, has_gradient: bool, chunk: tuple[Array, Array]
) -> tuple[Array, Array | None]:
    """Returns the losses of a chunk's rows and the gradient of each in its row."""
    x, labels = chunk
    logits, pull = linear(x)
    logits = soft_cap(logits, cap)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - largest)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)
    is_valid = (labels >= 0) & (labels < logits.shape[-1])
    losses = (jnp.log(total) - (chosen - largest))[:, 0]
    losses = jnp.where(is_valid, losses, jnp.nan)
    if not has_gradient:
        return losses, None
    words = lax.broadcasted_iota(labels.dtype, logits.shape, 1)
    is_label = words == labels[:, None]
    d = exps * (GRADIENT_SCALE / total) - jnp.where(is_label, GRADIENT_SCALE, 0)
    if cap is not None:
        d = d * (1 - jnp.square(logits / cap))
    unit = pull(d.astype(x.dtype)) / GRADIENT_SCALE
    unit = jnp.where(is_valid[:, None], unit, jnp.nan)
    return losses, unit.astype(x.dtype)
