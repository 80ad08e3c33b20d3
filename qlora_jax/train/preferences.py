"""The losses of a decoder on a batch of preferences, with the rewards of its answers.

The reference is the base without the adapter. Its log-probabilities are computed in the
step, where they have no gradient: no second model is held, and no array between steps.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import qlora_jax as ql

from .data.batching import Batch
from .objective import Loss, in_auto_axes, token_losses

PairObjective = Literal["dpo", "ipo", "orpo", "simpo"]
_WITH_REFERENCE = ("dpo", "ipo")
_OF_MEANS = ("ipo", "orpo", "simpo")  # over an answer's tokens


def preference_loss(
    model: Any,
    objective: Literal["dpo", "ipo", "orpo", "simpo", "kto"],
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> Loss:
    """Returns the loss of a decoder on a batch of preferences, for `make_step`.

    Args:
        model: A decoder of `qlora_jax.models`, wrapped by `qlora_jax.linen.wrap`.
        objective: The name of a loss in `ql.losses`.
        beta: As that loss has it.
        gamma: The margin of simpo.

    Returns:
        A function like that of `decoder_loss`: of the sum of the losses of pairs, or
        for kto of answers, and their number. Also of metrics, as TRL names them:
        rewards are `beta` times an answer's log-ratio, without a reference times its
        mean log-probability.

    Example:
        >>> import jax, numpy as np, qlora_jax as ql
        >>> from qlora_jax import train
        >>> from qlora_jax.models.config import DecoderConfig
        >>> from qlora_jax.models.decoder import Decoder
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> ids, answer = np.arange(4, dtype=np.int32), 2
        >>> rejected = train.Row(ids[::-1], ids[::-1], "rejected", answer, False)
        >>> pair = train.Row(ids, ids, "chosen", answer, True, rejected)
        >>> [batch] = train.eval_batches([pair], batch_size=1, max_length=4)
        >>> base = Decoder(config).init(jax.random.key(0), ids[None])["params"]
        >>> loss = train.preference_loss(ql.linen.wrap(Decoder(config)), "dpo")
        >>> total, pairs, metrics = loss({}, base, batch, None)
        >>> float(total), float(pairs), [*metrics][-1]
        (0.6931471824645996, 1.0, 'rewards/accuracies')
    """
    losses = token_losses(model)
    if objective == "kto":
        return in_auto_axes(functools.partial(_answers_loss, losses, beta))
    settings = {"gamma": gamma} if objective == "simpo" else {}
    return in_auto_axes(
        functools.partial(_pairs_loss, losses, objective, beta, settings)
    )


def _pairs_loss(
    losses: Callable,
    objective: PairObjective,
    beta: float,
    settings: dict[str, Any],
    lora: Any,
    base: Any,
    batch: Batch,
    key: Any,
) -> tuple[Array, Array, dict[str, Array]]:
    found = losses(lora, base, batch, key)
    scores, tokens = _log_probs(found, batch)
    if objective in _WITH_REFERENCE:
        scores -= _log_probs(losses({}, base, batch, None), batch)[0]
    means = scores / jnp.maximum(tokens, 1)
    rewards = beta * (scores if objective in _WITH_REFERENCE else means)
    # Answers come in twos: a chosen one and a rejected one.
    chosen, rejected = (means if objective in _OF_MEANS else scores).reshape(-1, 2).T
    if objective == "orpo":
        total, count = jnp.sum(found * batch.weights), jnp.sum(batch.weights)
        settings = {"nll": total / jnp.maximum(count, 1)}
    each = getattr(ql.losses, objective)(chosen, rejected, beta=beta, **settings)
    is_pair = tokens[::2] > 0
    return *_sum(each, is_pair), _metrics(rewards.reshape(-1, 2), is_pair)


def _metrics(rewards: Float[Array, "pairs 2"], is_pair: Array) -> dict[str, Array]:
    chosen, rejected = rewards.T
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": jnp.where(chosen > rejected, 1.0, 0.0),
    }
    return {name: jnp.stack(_sum(x, is_pair)) for name, x in metrics.items()}


def _answers_loss(
    losses: Callable, beta: float, lora: Any, base: Any, batch: Batch, key: Any
) -> tuple[Array, Array, dict[str, Array]]:
    # Rows come in twos: an answer, and the answer of another row to the same prompt.
    own, other = (
        jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], batch)
        for i in (0, 1)
    )
    reference, tokens = _log_probs(losses({}, base, batch, None), batch)
    reference, is_answer = reference.reshape(-1, 2), tokens[::2] > 0
    ratios = _log_probs(losses(lora, base, own, key), own)[0] - reference[:, 0]
    others = losses(jax.lax.stop_gradient(lora), base, other, key)
    others = _log_probs(others, other)[0] - reference[:, 1]
    total, count = _sum(others, is_answer)
    kl = jnp.maximum(total / jnp.maximum(count, 1), 0)
    is_desirable = jnp.sum(own.answers, axis=-1).reshape(-1) > 0
    each = ql.losses.kto(ratios, is_desirable, kl, beta=beta)
    rewards, sums = beta * ratios, {"kl": jnp.stack([kl * count, count])}
    chosen = jnp.stack(_sum(rewards, is_answer & is_desirable))
    rejected = jnp.stack(_sum(rewards, is_answer & ~is_desirable))
    # Without answers of both kinds there is no margin.
    has_both = (chosen[1] > 0) & (rejected[1] > 0)
    margin = chosen[0] / chosen[1] - rejected[0] / rejected[1]
    margin = jnp.where(has_both, jnp.stack([margin, jnp.ones_like(margin)]), 0)
    sums |= {"rewards/chosen": chosen, "rewards/rejected": rejected}
    return *_sum(each, is_answer), sums | {"rewards/margins": margin}


def _log_probs(found: Array, batch: Batch) -> tuple[Array, Array]:
    """Returns the log-probability of each sequence's answer, and its tokens."""
    mask = jnp.abs(jnp.asarray(batch.answers))
    total = -jnp.sum(found[:, None] * mask, axis=-1)
    return total.reshape(-1), jnp.sum(mask, axis=-1).reshape(-1)


def _sum(x: Float[Array, " n"], where: Bool[Array, " n"]) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(where, x, 0)), jnp.sum(where, dtype=jnp.float32)
