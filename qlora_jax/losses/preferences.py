"""Preference losses for pairs of answers, or for single answers.

Their inputs are log-probabilities of answers. The log-probability of a token is minus
its cross entropy, and that of an answer is the sum or the mean over its tokens. A
log-ratio is the log-probability under the trained model minus the log-probability under
the reference, which is the model before training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pairs = Float[Array, "*pairs"]
_LOG_HALF = -0.6931472  # where both forms of `_log1mexp` are equally precise


def dpo(chosen: Pairs, rejected: Pairs, *, beta: float = 0.1) -> Pairs:
    """Returns the losses of direct preference optimization (Rafailov et al., 2023).

    `-log(sigmoid(beta * (chosen - rejected)))`

    Args:
        chosen: The log-ratio of each chosen answer, summed over its tokens.
        rejected: The log-ratio of the rejected answer, summed over its tokens.
        beta: The strength of the pull towards the reference.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.dpo(jnp.array([0.0, 20.0]), jnp.array([0.0, -20.0]))
        Array([0.6931472 , 0.01814993], dtype=float32)
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected))


def ipo(chosen: Pairs, rejected: Pairs, *, beta: float = 0.1) -> Pairs:
    """Returns the losses of identity preference optimization (Azar et al., 2023).

    `(chosen - rejected - 1 / (2 * beta))**2`

    Args:
        chosen: The mean log-ratio of the tokens of each chosen answer.
        rejected: The mean log-ratio of the tokens of the rejected answer.
        beta: The strength of the pull towards the reference.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.ipo(jnp.array([0.0, 2.5]), jnp.array([0.0, -2.5]))
        Array([25.,  0.], dtype=float32)
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def simpo(
    chosen: Pairs, rejected: Pairs, *, beta: float = 0.1, gamma: float = 0.5
) -> Pairs:
    """Returns the losses of simple preference optimization (Meng et al., 2024).

    `-log(sigmoid(beta * (chosen - rejected) - gamma))`. It uses no reference model.

    Args:
        chosen: The mean log-probability of the tokens of each chosen answer.
        rejected: The mean log-probability of the tokens of the rejected answer.
        beta: The scale of the rewards.
        gamma: The margin by which the reward of the chosen answer should be larger.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.simpo(jnp.array([-1.0]), jnp.array([-6.0]))
        Array([0.6931472], dtype=float32)
    """
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


def orpo(
    chosen: Pairs, rejected: Pairs, nll: Float[Array, "..."], *, beta: float = 0.1
) -> Pairs:
    """Returns the losses of odds ratio preference optimization (Hong et al., 2024).

    `nll - beta * log(sigmoid(log(odds(chosen) / odds(rejected))))`, where an answer
    whose tokens have the (geometric) mean probability p has odds `p / (1 - p)`. It uses
    no reference model.

    Args:
        chosen: The mean log-probability of the tokens of each chosen answer.
        rejected: The mean log-probability of the tokens of the rejected answer.
        nll: The mean cross entropy of the tokens of the chosen answer of each pair, or
            of all chosen answers.
        beta: The weight of the odds ratio.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.orpo(jnp.array([-1.0]), jnp.array([-1.0]), jnp.array([1.0]))
        Array([1.0693147], dtype=float32)
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return nll - beta * jax.nn.log_sigmoid(log_odds)


def kto(
    answers: Float[Array, "*answers"],
    is_desirable: Bool[Array, "*answers"],
    kl: Float[Array, ""],
    *,
    beta: float = 0.1,
) -> Float[Array, "*answers"]:
    """Returns the losses of Kahneman-Tversky optimization (Ethayarajh et al., 2024).

    `1 - sigmoid(beta * (answers - kl))` for a desirable answer, and
    `1 - sigmoid(beta * (kl - answers))` for an undesirable one.

    Args:
        answers: The log-ratio of each answer, summed over its tokens.
        is_desirable: Whether the model should learn to give the answer, or to avoid it.
        kl: The mean log-ratio of answers that are paired with prompts of other
            rows, an estimate of the divergence from the reference. It gets no gradient,
            and negative values are replaced with 0.
        beta: The strength of the pull towards the reference.

    Example:
        >>> import jax.numpy as jnp, qlora_jax as ql
        >>> ql.losses.kto(jnp.array([0.0, 9.0]), jnp.array([True, True]), jnp.zeros(()))
        Array([0.5      , 0.2890505], dtype=float32)
    """
    kl = jnp.maximum(jax.lax.stop_gradient(kl), 0)
    sign = jnp.where(is_desirable, 1, -1)
    return jax.nn.sigmoid(-beta * sign * (answers - kl))


def _log1mexp(x: Array) -> Array:
    """Returns `log(1 - exp(x))` for x below 0, without cancellation (Mächler, 2012)."""
    # An answer of probability 1 would have infinite odds and a gradient of NaN.
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    # Near 0, `exp(x)` is close to 1, and `expm1` keeps the digits of the difference.
    # Far from 0, `log1p` keeps those of a small `exp(x)`. Both branches are
    # differentiated, so each gets an x at which it is finite.
    is_far = x < _LOG_HALF
    far, near = jnp.where(is_far, x, -1.0), jnp.where(is_far, -0.5, x)
    return jnp.where(is_far, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))
