"""The losses of a decoder on a batch of preferences, with the rewards of its answers.

The reference is the base without the adapter. Its log-probabilities are computed in the
step, where they have no gradient: no second model is held, and no array between steps.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import qlora_jax as ql

from .data.batching import Batch
from .objective import Loss, in_auto_axes, token_losses

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
    has_reference, is_mean = objective in _WITH_REFERENCE, objective in _OF_MEANS
    settings = {"gamma": gamma} if objective == "simpo" else {}

    def reference(base: Any, batch: Batch) -> Array:
        return _log_probs(losses({}, base, batch, None), batch)[0]

    def of_pairs(lora: Any, base: Any, batch: Batch, key: Any) -> tuple:
        found = losses(lora, base, batch, key)
        scores, tokens = _log_probs(found, batch)
        if has_reference:
            scores -= reference(base, batch)
        means = scores / jnp.maximum(tokens, 1)
        # Answers come in twos: a chosen one and a rejected one.
        pairs = (means if is_mean else scores).reshape(-1, 2).T
        nll = {}
        if objective == "orpo":
            total, count = jnp.sum(found * batch.weights), jnp.sum(batch.weights)
            nll["nll"] = total / jnp.maximum(count, 1)
        each = getattr(ql.losses, objective)(*pairs, beta=beta, **settings, **nll)
        rewards = beta * (scores if has_reference else means)
        is_pair = tokens[::2] > 0
        return *_sum(each, is_pair), _metrics(rewards.reshape(-1, 2), is_pair)

    def of_answers(lora: Any, base: Any, batch: Batch, key: Any) -> tuple:
        # Rows come in twos: an answer, and that of another row to the same prompt.
        half = lambda i: lambda x: x.reshape(-1, 2, *x.shape[1:])[:, i]
        own, other = (jax.tree.map(half(i), batch) for i in (0, 1))
        bare = reference(base, batch).reshape(-1, 2)
        scores, tokens = _log_probs(losses(lora, base, own, key), own)
        scores, is_answer = scores - bare[:, 0], tokens > 0
        others = losses(jax.lax.stop_gradient(lora), base, other, key)
        others = _log_probs(others, other)[0] - bare[:, 1]
        total, count = _sum(others, is_answer)
        kl = jnp.maximum(total / jnp.maximum(count, 1), 0)
        is_good = jnp.sum(own.answers, axis=-1).reshape(-1) > 0
        each = ql.losses.kto(scores, is_good, kl, beta=beta)
        chosen, rejected = (
            jnp.stack(_sum(beta * scores, is_answer & x)) for x in (is_good, ~is_good)
        )
        # Without answers of both kinds there is no margin.
        has_both = (chosen[1] > 0) & (rejected[1] > 0)
        margin = chosen[0] / chosen[1] - rejected[0] / rejected[1]
        margin = jnp.where(has_both, jnp.stack([margin, jnp.ones_like(margin)]), 0)
        sums = {"kl": jnp.stack([kl * count, count]), "rewards/chosen": chosen}
        sums |= {"rewards/rejected": rejected, "rewards/margins": margin}
        return *_sum(each, is_answer), sums

    return in_auto_axes(of_answers if objective == "kto" else of_pairs)


def _metrics(rewards: Float[Array, "pairs 2"], is_pair: Array) -> dict[str, Array]:
    chosen, rejected = rewards.T
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": jnp.where(chosen > rejected, 1.0, 0.0),
    }
    return {name: jnp.stack(_sum(x, is_pair)) for name, x in metrics.items()}


def _log_probs(found: Array, batch: Batch) -> tuple[Array, Array]:
    """Returns the log-probability of each sequence's answer, and its tokens."""
    mask = jnp.abs(jnp.asarray(batch.answers))
    total = -jnp.sum(found[:, None] * mask, axis=-1)
    return total.reshape(-1), jnp.sum(mask, axis=-1).reshape(-1)


def _sum(x: Float[Array, " n"], where: Bool[Array, " n"]) -> tuple[Array, Array]:
    return jnp.sum(jnp.where(where, x, 0)), jnp.sum(where, dtype=jnp.float32)
