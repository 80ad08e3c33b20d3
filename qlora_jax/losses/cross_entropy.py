"""Cross entropy that never stores the logits of all tokens at once.

The logits, float32 `[tokens, V]`, are often the largest array of a training step.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from .._jax.modes import call_in_auto_mode, varying_with
from .._jax.specs import spec_of
from ..adapters.product import adapted_product
from ..product.backends.reference import accumulator_dtype, dot
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel, is_kernel

# The bytes of a chunk's logits, and the fewest tokens of a chunk. Each chunk reads the
# entire head, so products with fewer rows would be bound by memory bandwidth.
CHUNK_BYTES, FEWEST_TOKENS = 64 * 2**20, 256
# The gradients with respect to logits are multiplied by this factor before they are
# cast. Otherwise, most of them would lose precision in float16, because probabilities
# are often below 6e-5. A power of two changes only exponents.
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
    """Returns the cross entropy of each token in nats, from hidden states and the head.

    It equals optax's `softmax_cross_entropy_with_integer_labels` of the logits, but
    stores the logits of only `chunk_size` tokens at a time. The head is frozen. Only
    `hidden` gets a gradient, which the forward pass computes while it has the logits.

    To mask tokens, weight the losses: `jnp.sum(losses * weights) / jnp.sum(weights)`. A
    label outside 0 to V - 1, such as -100, gives a loss and a gradient of NaN. Give
    such a token any label in the vocabulary and a weight of 0.

    The head is cast to the dtype of `hidden`, and products are summed in float32.
    Softmax and losses are float32. The logits of a packed head are those of `matmul`,
    rounded to the dtype of `hidden`.

    Args:
        hidden: The hidden states after the last norm.
        head: The weights of the head: `[V, D]`, as in an embedding, or `[D, V]`, as in
            the kernel of a dense layer. It is a float array or a kernel of any kind.
        labels: The correct token for each hidden state.
        contract: The axis of the head that is contracted: -1 for `[V, D]`, -2 for
            `[D, V]`. Ignored for a kernel.
        chunk_size: The largest number of tokens whose logits are stored at once. By
            default, the number whose logits take 64 MiB, but at least 256.
        logit_soft_cap: The bound to pass to `soft_cap`. Pass None for no bound.

    Raises:
        TypeError: If `hidden` or `head` is not floating-point, or `labels` are not
            integers.
        ValueError: If the shapes do not match, if `contract` is neither -1 nor -2, if
            `chunk_size` is not positive, if `logit_soft_cap` is not positive and
            finite, or if the head is differentiated.

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
    if logit_soft_cap is not None and not 0 < logit_soft_cap < math.inf:
        raise ValueError(
            f"`logit_soft_cap` must be positive and finite. Got {logit_soft_cap}."
        )
    if chunk_size is None:
        bytes_per_token = 4 * max(kernel.matrix_shape[-1], 1)
        chunk_size = max(CHUNK_BYTES // bytes_per_token, FEWEST_TOKENS)
    if labels.dtype.itemsize < 4:
        # Labels are compared with all token ids in the dtype of the labels.
        labels = labels.astype(jnp.int32)
    hidden = varying_with(hidden, kernel, labels)
    return _losses(chunk_size, logit_soft_cap, hidden, kernel, labels)


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Returns `cap * tanh(logits / cap)` (Gemma 2, Gemma Team 2024, section 2).

    Args:
        logits: The values to bound.
        cap: Their bound. Pass None for no bound.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.soft_cap(jnp.array([-1000.0, 0.0, 1000.0]), 30.0)
        Array([-30.,   0.,  30.], dtype=float32)
    """
    return logits if cap is None else cap * jnp.tanh(logits / cap)


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
            f"`hidden` must have shape [..., {width}] to match the head. Got "
            f"{hidden.shape}, and a head {head.shape} with `contract={contract}`."
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {hidden.shape[:-1]}, one for each token of "
            f"`hidden`. Got {labels.shape}."
        )


# With the logits l of a token, c = cap * tanh(l / cap) and its label y,
#   loss = log(sum_j exp(c_j)) - c_y,
#   d loss / d l_j = (softmax(c)_j - [j = y]) * (1 - (c_j / cap)^2).
# A loss depends only on its own row of `hidden`. The forward pass therefore keeps
# `unit = d loss / d hidden`, `[*tokens, D]`, and the backward pass returns `g * unit`.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(
    chunk_size: int, cap: float | None, hidden: Array, head: Kernel, labels: Array
) -> Array:
    return _compute(chunk_size, cap, hidden, head, labels, has_gradient=False)[0]


def _losses_fwd(
    chunk_size: int, cap: float | None, hidden: PyTree, head: PyTree, labels: PyTree
) -> tuple[Array, Array | None]:
    # With `symbolic_zeros`, each array is wrapped together with a flag that says
    # whether it is differentiated.
    def is_wrapped(leaf: object) -> bool:
        return hasattr(leaf, "perturbed")

    if any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=is_wrapped)):
        raise ValueError(
            "`head` must be frozen, because it gets no gradient. Got one that is "
            "differentiated. Pass `jax.lax.stop_gradient(head)`, or compute the loss "
            "from the logits to train it."
        )
    hidden, head, labels = jax.tree.map(
        lambda leaf: leaf.value, (hidden, head, labels), is_leaf=is_wrapped
    )
    return _compute(chunk_size, cap, hidden, head, labels, has_gradient=True)


def _losses_bwd(
    chunk_size: int, cap: float | None, unit: Array, g: PyTree
) -> tuple[Array, None, None]:
    del chunk_size, cap
    g = jnp.expand_dims(g, -1)
    return (unit * g).astype(unit.dtype), None, None


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnames=("chunk_size", "cap", "has_gradient"))
def _compute(
    chunk_size: int,
    cap: float | None,
    hidden: Array,
    head: Kernel,
    labels: Array,
    has_gradient: bool,
) -> tuple[Array, Array | None]:
    """Returns the losses and, with `has_gradient`, the gradient of each loss."""

    def compute_by_chunks(
        hidden: Array, head: Kernel, labels: Array
    ) -> tuple[Array, Array | None]:
        compute_chunk = functools.partial(
            _compute_chunk, _linear(head, hidden.dtype), cap, has_gradient
        )
        num_chunks = _num_chunks(labels.size, chunk_size)
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        if num_chunks == 1:
            losses, unit = compute_chunk((rows, targets))
        else:
            chunks = _cut(rows, num_chunks), _cut(targets, num_chunks)
            join = functools.partial(_join, num_tokens=labels.size)
            losses, unit = jax.tree.map(join, lax.map(compute_chunk, chunks))
        losses = losses.reshape(labels.shape)
        return losses, unit if unit is None else unit.reshape(hidden.shape)

    # Explicit mode has no rule for rows that are split into chunks.
    spec = spec_of(hidden)
    specs = PartitionSpec(*spec[:-1]), PartitionSpec(*spec) if has_gradient else None
    return call_in_auto_mode(compute_by_chunks, lambda _: specs, hidden, head, labels)


def _num_chunks(num_tokens: int, chunk_size: int) -> int:
    # Prefers a number that divides the tokens, because `_cut` then copies nothing.
    fewest = max(-(-num_tokens // chunk_size), 1)
    for count in range(fewest, min(2 * fewest, num_tokens + 1)):
        if num_tokens % count == 0:
            return count
    return fewest


def _cut(x: Array, num_chunks: int) -> Array:
    """Cuts rows `[tokens, ...]` into padded chunks `[chunks, tokens / chunks, ...]`."""
    # A chunk holds every `num_chunks`-th row. If the rows are split over devices, each
    # chunk then has rows of all devices.
    if padding := -x.shape[0] % num_chunks:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, num_chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, num_tokens: int) -> Array:
    """Inverts `_cut`, and drops the padding."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:num_tokens]


# Maps rows `[t, D]` to their logits `[t, V]` and a second function. This one maps
# gradients with respect to the logits to gradients with respect to the rows.
Linear = Callable[[Array], tuple[Array, Callable[[Array], Array]]]


def _linear(head: Kernel, dtype: np.dtype) -> Linear:
    accumulator = accumulator_dtype(dtype)

    def multiply_packed(rows: Array) -> tuple[Array, Callable[[Array], Array]]:
        logits, pull_back = jax.vjp(lambda rows: adapted_product(rows, head), rows)
        return logits.astype(accumulator), lambda g: pull_back(g)[0].astype(accumulator)

    if head.packing is not None:
        return multiply_packed
    w, is_embedding = head.value.astype(dtype), head.geometry.kinds == "nk"
    product = functools.partial(dot, w=w, precision=None)

    def multiply_float(rows: Array) -> tuple[Array, Callable[[Array], Array]]:
        logits = product(rows, transpose=is_embedding)
        return logits, lambda g: product(g, transpose=not is_embedding)

    return multiply_float


def _compute_chunk(
    linear: Linear, cap: float | None, has_gradient: bool, chunk: tuple[Array, Array]
) -> tuple[Array, Array | None]:
    """Returns the loss of each row, and its gradient with respect to the row."""
    rows, labels = chunk
    logits, pull_back = linear(rows)
    logits = soft_cap(logits, cap)
    # The largest logit is subtracted, so that no exponential overflows.
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - largest)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    label_logits = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)
    is_valid = (labels >= 0) & (labels < logits.shape[-1])
    losses = (jnp.log(total) - (label_logits - largest))[:, 0]
    losses = jnp.where(is_valid, losses, jnp.nan)
    if not has_gradient:
        return losses, None
    token_ids = lax.broadcasted_iota(labels.dtype, logits.shape, 1)
    is_label = token_ids == labels[:, None]
    # The softmax minus the one-hot label, times GRADIENT_SCALE.
    g = exps * (GRADIENT_SCALE / total) - jnp.where(is_label, GRADIENT_SCALE, 0)
    if cap is not None:
        g = g * (1 - jnp.square(logits / cap))
    unit = pull_back(g.astype(rows.dtype)) / GRADIENT_SCALE
    unit = jnp.where(is_valid[:, None], unit, jnp.nan)
    return losses, unit.astype(rows.dtype)
