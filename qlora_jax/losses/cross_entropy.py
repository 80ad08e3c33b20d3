"""Cross entropy that never stores the logits of all tokens at once."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from ..quant.kernel import Kernel
from .chunks import GRADIENT_SCALE, check_chunk_size, check_head, chunked_losses


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
        >>> hidden, head = jnp.ones((2, 3, 64)), jnp.ones((32, 64))
        >>> labels = jnp.zeros((2, 3), jnp.int32)
        >>> losses = ql.losses.chunked_cross_entropy(hidden, head, labels, chunk_size=4)
        >>> losses.shape, bool(jnp.allclose(losses, jnp.log(32)))
        ((2, 3), True)
        >>> packed = ql.quantize(head.T)  # a kernel [D, V]
        >>> loss = lambda x: ql.losses.chunked_cross_entropy(x, packed, labels).mean()
        >>> jax.grad(loss)(hidden).shape
        (2, 3, 64)
    """
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    kernel = check_head(hidden, head, contract, logit_soft_cap)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integer. Got {labels.dtype}.")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {hidden.shape[:-1]}, one for each token of "
            f"`hidden`. Got {labels.shape}."
        )
    chunk_size = check_chunk_size(chunk_size, kernel.matrix_shape[-1])
    if labels.dtype.itemsize < 4:
        # Labels are compared with all token ids in the dtype of the labels.
        labels = labels.astype(jnp.int32)
    return chunked_losses(
        _cross_entropies, chunk_size, logit_soft_cap, hidden, kernel, labels
    )


# With the logits c of a token and its label y,
#   loss = log(sum_j exp(c_j)) - c_y,
#   d loss / d c_j = softmax(c)_j - [j = y].
def _cross_entropies(
    logits: Array, labels: Array, frozen: PyTree, has_gradient: bool
) -> tuple[Array, Array | None]:
    del frozen
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
    return losses, g
