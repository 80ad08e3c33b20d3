"""The losses of tokens, without storing the logits of all tokens at once.

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
from jaxtyping import Array, Float, PyTree

from .._jax.arguments import unwrap_operands
from .._jax.modes import call_in_auto_mode, varying_with
from .._jax.specs import spec_of
from ..adapters.product import product
from ..product.backends.reference import accumulator_dtype, dot
from ..quant.geometry import Geometry
from ..quant.kernel import Kernel, as_kernel, is_kernel

# By default, a chunk has as many tokens as have CHUNK_BYTES of logits, but at least
# FEWEST_TOKENS. Each chunk reads the entire head, so products with fewer rows would be
# bound by memory bandwidth.
CHUNK_BYTES, FEWEST_TOKENS = 64 * 2**20, 256
# The gradients with respect to logits are multiplied by this factor before they are
# cast to the dtype of `hidden`. Most of them are probabilities, which are often below
# 6e-5, where float16 loses precision. A power of two changes only exponents.
GRADIENT_SCALE = 1024.0

# A function of logits `[t, V]`, the targets of their tokens (such as labels, or hidden
# states of a teacher), a frozen tree that all tokens share, and whether a gradient is
# needed. It returns the losses `[t]` and, if needed, their gradients with respect to
# the logits, times GRADIENT_SCALE. It must be hashable, because `jax.jit` gets it as a
# static argument.
TokenLoss = Callable[[Array, PyTree, PyTree, bool], tuple[Array, Array | None]]


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


def check_chunk_size(chunk_size: int | None, num_logits: int) -> int:
    """Returns the checked `chunk_size`, or a default for `num_logits` per token."""
    if chunk_size is None:
        return max(CHUNK_BYTES // (4 * max(num_logits, 1)), FEWEST_TOKENS)
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be positive. Got {chunk_size}.")
    return chunk_size


def check_head(
    hidden: Array,
    head: Array | Kernel,
    contract: int,
    cap: float | None,
    prefix: str = "",
) -> Kernel:
    """Returns the head as a kernel, after checking that it fits the hidden states."""
    geometry = Geometry("nk" if contract == -1 else "kn")
    kernel = head if is_kernel(head) else as_kernel(jnp.asarray(head), geometry)
    for name, x in (("hidden", hidden), ("head", kernel)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{prefix}{name}` must be floating. Got {x.dtype}.")
    if contract not in (-1, -2):
        raise ValueError(f"`{prefix}contract` must be -1 or -2. Got {contract}.")
    if kernel.ndim != 2:
        raise ValueError(
            f"`{prefix}head` must have two axes. Got shape {kernel.shape}."
        )
    width = kernel.matrix_shape[-2]
    if not hidden.ndim or hidden.shape[-1] != width:
        raise ValueError(
            f"`{prefix}hidden` must have shape [..., {width}] to match the head. Got "
            f"{hidden.shape}, and a head {kernel.shape} with `contract={contract}`."
        )
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(
            f"`{prefix}logit_soft_cap` must be positive and finite. Got {cap}."
        )
    return kernel


def chunked_losses(
    token_loss: TokenLoss,
    chunk_size: int,
    cap: float | None,
    hidden: Array,
    head: Kernel,
    targets: PyTree,
    frozen: PyTree = (),
) -> Array:
    """Returns the loss of each token. Only `hidden` gets a gradient.

    Args:
        token_loss: Computes the losses of the tokens of a chunk from their logits.
        chunk_size: The largest number of tokens whose logits are stored at once.
        cap: The soft cap of the logits, or None.
        hidden: The hidden states `[*tokens, D]`.
        head: The weights of the head, which are frozen.
        targets: The targets to pass to `token_loss`. These arrays `[*tokens, ...]` are
            cut into chunks, as `hidden` is.
        frozen: The arrays or kernels to pass to `token_loss` whole, for each chunk.
    """
    hidden = varying_with(hidden, head, targets, frozen)
    return _losses(token_loss, chunk_size, cap, hidden, head, targets, frozen)


# For the logits l of a token and their capped values c = cap * tanh(l / cap), the loss
# f(c) has the gradient
#   d loss / d l_j = (d f / d c_j) * (1 - (c_j / cap)^2).
# The loss of a token depends only on its own row of `hidden`. So the forward pass keeps
# `grad`, the gradient of each loss with respect to its own row, `[*tokens, D]`. The
# backward pass multiplies it by g, the gradient with respect to each loss.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(
    token_loss: TokenLoss, chunk_size: int, cap: float | None, *arrays: PyTree
) -> Array:
    return _compute(token_loss, chunk_size, cap, *arrays, has_gradient=False)[0]


def _losses_fwd(
    token_loss: TokenLoss, chunk_size: int, cap: float | None, *arrays: PyTree
) -> tuple[Array, Array | None]:
    _, head, *_ = arrays
    arrays = unwrap_operands(
        arrays,
        head,
        "`head` must be frozen, because it gets no gradient. Got one that is "
        "differentiated. Pass `jax.lax.stop_gradient(head)`, or compute the loss from "
        "the logits to train it.",
    )
    return _compute(token_loss, chunk_size, cap, *arrays, has_gradient=True)


def _losses_bwd(
    token_loss: TokenLoss, chunk_size: int, cap: float | None, grad: Array, g: PyTree
) -> tuple[Array, None, None, None]:
    del token_loss, chunk_size, cap
    return (grad * g[..., None]).astype(grad.dtype), None, None, None


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


@functools.partial(
    jax.jit, static_argnames=("token_loss", "chunk_size", "cap", "has_gradient")
)
def _compute(
    token_loss: TokenLoss,
    chunk_size: int,
    cap: float | None,
    hidden: Array,
    head: Kernel,
    targets: PyTree,
    frozen: PyTree,
    has_gradient: bool,
) -> tuple[Array, Array | None]:
    """Returns the losses and, with `has_gradient`, their gradients for `hidden`."""

    def compute_by_chunks(
        hidden: Array, head: Kernel, targets: PyTree, frozen: PyTree
    ) -> tuple[Array, Array | None]:
        multiply = head_product(head, hidden.dtype)

        def compute_chunk(chunk: tuple[Array, PyTree]) -> tuple[Array, Array | None]:
            rows, row_targets = chunk  # [t, D] and [t, ...]
            logits, pull_back = multiply(rows)
            logits = soft_cap(logits, cap)
            losses, logit_grad = token_loss(logits, row_targets, frozen, has_gradient)
            if logit_grad is None:
                return losses, None
            if cap is not None:
                logit_grad *= 1 - jnp.square(logits / cap)
            grad = pull_back(logit_grad.astype(rows.dtype)) / GRADIENT_SCALE
            # If a loss is NaN, as for an invalid label, its gradient shall be NaN, too.
            grad = jnp.where(jnp.isnan(losses)[:, None], jnp.nan, grad)
            return losses, grad.astype(rows.dtype)

        lead = hidden.shape[:-1]
        num_tokens = math.prod(lead)
        num_chunks = _num_chunks(num_tokens, chunk_size)
        all_rows = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[len(lead) :]), (hidden, targets)
        )
        if num_chunks == 1:
            losses, grad = compute_chunk(all_rows)
        else:
            chunks = jax.tree.map(lambda x: _cut(x, num_chunks), all_rows)
            join = functools.partial(_join, num_tokens=num_tokens)
            losses, grad = jax.tree.map(join, lax.map(compute_chunk, chunks))
        if grad is not None:
            grad = grad.reshape(hidden.shape)
        return losses.reshape(lead), grad

    # Explicit mode has no rule for rows that are split into chunks.
    spec = spec_of(hidden)
    specs = PartitionSpec(*spec[:-1]), PartitionSpec(*spec) if has_gradient else None
    arrays = hidden, head, targets, frozen
    return call_in_auto_mode(compute_by_chunks, lambda _: specs, *arrays)


def _num_chunks(num_tokens: int, chunk_size: int) -> int:
    # Prefers a number of chunks that divides the number of tokens, because `_cut` then
    # needs no padding, but not twice the fewest: products with few rows are slow.
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


# Maps rows `[t, D]` to their logits `[t, V]`, and to a function for the backward pass:
# from gradients with respect to these logits to gradients with respect to the rows.
HeadProduct = Callable[[Array], tuple[Array, Callable[[Array], Array]]]


def head_product(head: Kernel, dtype: np.dtype) -> HeadProduct:
    """Returns the function that multiplies rows of this dtype by a head."""
    accumulator = accumulator_dtype(dtype)

    def multiply_packed(rows: Array) -> tuple[Array, Callable[[Array], Array]]:
        logits, pull_back = jax.vjp(lambda rows: product(rows, head), rows)
        return logits.astype(accumulator), lambda g: pull_back(g)[0].astype(accumulator)

    if head.packing is not None:
        return multiply_packed
    w, is_embedding = head.value.astype(dtype), head.geometry.kinds == "nk"
    multiply = functools.partial(dot, w=w, precision=None)

    def multiply_float(rows: Array) -> tuple[Array, Callable[[Array], Array]]:
        logits = multiply(rows, transpose=is_embedding)
        return logits, lambda g: multiply(g, transpose=not is_embedding)

    return multiply_float
