"""The divergence from a teacher, without storing the logits of all tokens at once."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..quant.kernel import Kernel
from .chunks import (
    GRADIENT_SCALE,
    check_chunk_size,
    check_head,
    chunked_losses,
    head_product,
    soft_cap,
)


def chunked_kl_divergence(
    hidden: Float[Array, "*tokens D"],
    head: Float[Array, "_ _"] | Kernel,
    teacher_hidden: Float[Array, "*tokens E"],
    teacher_head: Float[Array, "_ _"] | Kernel,
    *,
    temperature: float = 1.0,
    contract: int = -1,
    logit_soft_cap: float | None = None,
    teacher_contract: int = -1,
    teacher_logit_soft_cap: float | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "*tokens"]:
    """Returns the divergence of each token's distribution from that of a teacher.

    With the logits t of the teacher and s of the student, the result is, in nats,
    `temperature**2 * KL(softmax(t / temperature) || softmax(s / temperature))`. The
    factor `temperature**2` keeps the gradients at about the same size when the
    temperature changes (Hinton et al., 2015, section 2).

    The logits of both models are stored for only `chunk_size` tokens at a time. The
    heads and the teacher are frozen: only `hidden` gets a gradient. Matrix products are
    as precise as in `chunked_cross_entropy`.

    Args:
        hidden: The hidden states of the student after its last norm.
        head: The weights of the student's head, as in `chunked_cross_entropy`.
        teacher_hidden: The hidden states of the teacher, whose width may differ.
        teacher_head: The weights of the teacher's head, for the same vocabulary.
        temperature: The divisor of the logits.
        contract: The axis of the head that is contracted: -1 for `[V, D]`, -2 for
            `[D, V]`. Ignored for a kernel.
        logit_soft_cap: The bound to pass to `soft_cap`. Pass None for no bound.
        teacher_contract: As `contract`, for the teacher.
        teacher_logit_soft_cap: As `logit_soft_cap`, for the teacher.
        chunk_size: The largest number of tokens whose logits are stored at once. By
            default, as many as have 64 MiB of logits in both models together, but at
            least 256.

    Raises:
        TypeError: If hidden states or heads are not floating-point.
        ValueError: If the shapes or the vocabularies do not match, if an argument is
            out of its range, or if the student's head is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql
        >>> hidden, head = jnp.ones((2, 3, 8)), jnp.eye(32, 8)
        >>> teacher = 2 * hidden, head
        >>> losses = ql.losses.chunked_kl_divergence(hidden, head, *teacher)
        >>> losses.shape, bool((losses > 0).all())
        ((2, 3), True)
        >>> same = ql.losses.chunked_kl_divergence(hidden, head, hidden, head)
        >>> bool(jnp.allclose(same, 0, atol=1e-6))
        True
    """
    hidden, teacher_hidden = jnp.asarray(hidden), jnp.asarray(teacher_hidden)
    kernel = check_head(hidden, head, contract, logit_soft_cap)
    teacher_kernel = check_head(
        teacher_hidden,
        teacher_head,
        teacher_contract,
        teacher_logit_soft_cap,
        "teacher_",
    )
    tokens_shape, vocabulary_size = hidden.shape[:-1], kernel.matrix_shape[-1]
    if teacher_hidden.shape[:-1] != tokens_shape:
        axes = ", ".join(map(str, tokens_shape))
        raise ValueError(
            f"`teacher_hidden` must have shape [{axes}, E], one row for each "
            f"token of `hidden`. Got {teacher_hidden.shape}."
        )
    if teacher_kernel.matrix_shape[-1] != vocabulary_size:
        raise ValueError(
            f"`teacher_head` must have the vocabulary of `head`, {vocabulary_size}. "
            f"Got {teacher_kernel.matrix_shape[-1]}."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite. Got {temperature}."
        )
    return chunked_losses(
        _Divergence(temperature, teacher_logit_soft_cap),
        check_chunk_size(chunk_size, 2 * vocabulary_size),
        logit_soft_cap,
        hidden,
        kernel,
        *jax.lax.stop_gradient((teacher_hidden, teacher_kernel)),
    )


# With the temperature T, p = softmax(t / T) and q = softmax(s / T),
#   loss = T^2 * sum_j p_j * (log p_j - log q_j),
#   d loss / d s_j = T * (q_j - p_j).
@dataclass(frozen=True)
class _Divergence:
    temperature: float
    teacher_cap: float | None

    def __call__(
        self,
        logits: Array,
        teacher_rows: Array,
        teacher_head: Kernel,
        has_gradient: bool,
    ) -> tuple[Array, Array | None]:
        multiply = head_product(teacher_head, teacher_rows.dtype)
        teacher_logits, _ = multiply(teacher_rows)
        teacher_logits = soft_cap(teacher_logits, self.teacher_cap)
        log_q = jax.nn.log_softmax(logits / self.temperature)
        log_p = jax.nn.log_softmax(teacher_logits / self.temperature)
        p = jnp.exp(log_p)
        losses = self.temperature**2 * jnp.sum(p * (log_p - log_q), axis=-1)
        if not has_gradient:
            return losses, None
        return losses, (self.temperature * GRADIENT_SCALE) * (jnp.exp(log_q) - p)
