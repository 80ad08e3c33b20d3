"""Losses of a decoder on batches of tokens or preferences, and their means."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

import qlora_jax as ql

from ..data.batching import Batch
from ..models.decoder import head_arguments
from ..models.experts import balance_loss
from .step import Loss

_USES_REFERENCE = ("dpo", "ipo")
_IS_LENGTH_NORMALIZED = ("ipo", "orpo", "simpo")


def decoder_loss(model: Any, balance: float = 0.0) -> Loss:
    """Returns the loss of a decoder on a batch, for `make_step`.

    Args:
        model: A decoder of `qlora_jax.llm.models`, wrapped by `qlora_jax.linen.wrap`.
        balance: The factor of the loss that balances the load of experts, which is
            added to the mean loss. In transformers: `router_aux_loss_coef`.

    Returns:
        A function of the lora tree, the base tree, a `Batch`, and a PRNG key for
        dropout or None. It returns the sum of the losses of the target tokens, in
        nats, and their number. Inside it, explicit mesh axes become Auto.

    Example:
        >>> import jax, numpy as np, qlora_jax as ql
        >>> from qlora_jax.llm import data, train
        >>> from qlora_jax.llm.models.config import DecoderConfig
        >>> from qlora_jax.llm.models.decoder import Decoder
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> row = np.arange(4, dtype=np.int32)[None]
        >>> batch = data.Batch(row, row * 0 + 1, row, row, row, np.ones((1, 4)))
        >>> base = Decoder(config).init(jax.random.key(0), row)["params"]
        >>> loss = train.decoder_loss(ql.linen.wrap(Decoder(config)))
        >>> total, tokens = loss({}, base, batch, None)
        >>> total.shape, float(tokens)
        ((), 4.0)
    """
    compute_token_losses = token_losses(model)
    if balance and (model.config.experts is None or model.mlp_tile is not None):
        raise ValueError(
            "`balance` must be 0 for a decoder without experts, or with `mlp_tile`. "
            f"Got {balance}."
        )

    def loss(lora, base, batch, dropout_key):
        count = jnp.sum(batch.weights)
        arguments = lora, base, batch, dropout_key
        if not balance:
            return jnp.sum(compute_token_losses(*arguments) * batch.weights), count
        losses, collections = compute_token_losses(*arguments, mutable="router")
        (logits,) = collections["router"]["layers"]["mlp"]["logits"]
        is_token = (batch.segment_ids != 0).reshape(-1).astype(jnp.float32)  # [B * T]
        penalty = balance * balance_loss(logits, is_token, model.config.experts)
        # The step divides by `count`, which must leave the penalty as it is.
        return jnp.sum(losses * batch.weights) + penalty * count, count

    return _in_auto_axes(loss)


def preference_loss(
    model: Any,
    objective: Literal["dpo", "ipo", "orpo", "simpo", "kto"],
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> Loss:
    """Returns the loss of a decoder on a batch of preferences, for `make_step`.

    The reference model is the base without the adapter. Its log-probabilities are
    computed inside the step, without gradient, so no second model is in memory.

    Args:
        model: A decoder of `qlora_jax.llm.models`, wrapped by `qlora_jax.linen.wrap`.
        objective: The name of a loss in `ql.losses`.
        beta: The `beta` argument of that loss.
        gamma: The margin of simpo.

    Returns:
        A function like the one that `decoder_loss` returns. Its results are the sum of
        the losses of pairs (for kto: of completions), their number, and metrics named
        as in TRL. A reward is `beta` times the log-ratio of a completion or, without a
        reference model, times its mean log-probability.

    Example:
        >>> import jax, numpy as np, qlora_jax as ql
        >>> from qlora_jax.llm import data, train
        >>> from qlora_jax.llm.models.config import DecoderConfig
        >>> from qlora_jax.llm.models.decoder import Decoder
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> ids, answer = np.arange(4, dtype=np.int32), 2
        >>> rejected = data.Row(ids[::-1], ids[::-1], "rejected", answer, False)
        >>> pair = data.Row(ids, ids, "chosen", answer, True, rejected)
        >>> [batch] = data.eval_batches([pair], batch_size=1, max_length=4)
        >>> base = Decoder(config).init(jax.random.key(0), ids[None])["params"]
        >>> loss = train.preference_loss(ql.linen.wrap(Decoder(config)), "dpo")
        >>> total, pairs, metrics = loss({}, base, batch, None)
        >>> float(total), float(pairs), [*metrics][-1]
        (0.6931471824645996, 1.0, 'rewards/accuracies')
    """
    compute_token_losses = token_losses(model)
    if objective == "kto":
        return _in_auto_axes(_kto_loss(compute_token_losses, beta))
    settings = {"beta": beta} | ({"gamma": gamma} if objective == "simpo" else {})
    return _in_auto_axes(_pairwise_loss(compute_token_losses, objective, settings))


def _pairwise_loss(
    compute_token_losses: Callable[..., Any], objective: str, settings: dict[str, Any]
) -> Loss:
    uses_reference = objective in _USES_REFERENCE

    def loss(lora, base, batch, dropout_key):
        losses = compute_token_losses(lora, base, batch, dropout_key)  # [B, P]
        log_ratios, num_tokens = _completion_log_probs(losses, batch)  # [N] each
        if uses_reference:
            reference_losses = compute_token_losses({}, base, batch, None)
            log_ratios -= _completion_log_probs(reference_losses, batch)[0]
        means = log_ratios / jnp.maximum(num_tokens, 1)
        scores = means if objective in _IS_LENGTH_NORMALIZED else log_ratios
        # Rows alternate between chosen and rejected completions of the same prompt.
        chosen, rejected = scores.reshape(-1, 2).T  # [N / 2] each
        likelihood = {}
        if objective == "orpo":  # `weights` are 0 for rejected completions
            total, count = jnp.sum(losses * batch.weights), jnp.sum(batch.weights)
            likelihood["nll"] = total / jnp.maximum(count, 1)
        compute_pair_losses = getattr(ql.losses, objective)
        pair_losses = compute_pair_losses(chosen, rejected, **settings, **likelihood)
        rewards = settings["beta"] * (log_ratios if uses_reference else means)
        is_pair = num_tokens[::2] > 0  # padding rows have no tokens
        metrics = _reward_metrics(rewards.reshape(-1, 2), is_pair)
        return *_sum_and_count(pair_losses, is_pair), metrics

    return loss


def _kto_loss(compute_token_losses: Callable[..., Any], beta: float) -> Loss:
    def log_probs(lora, base, batch, dropout_key):
        losses = compute_token_losses(lora, base, batch, dropout_key)
        return _completion_log_probs(losses, batch)

    def loss(lora, base, batch, dropout_key):
        # Rows alternate between a prompt with its own completion, and the same prompt
        # with the completion of another row. The log-ratios of these mismatched
        # completions estimate the KL divergence.
        reference = log_probs({}, base, batch, None)[0].reshape(-1, 2)
        completions, mismatched = (
            jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], batch)
            for i in range(2)
        )
        log_ratios, num_tokens = log_probs(lora, base, completions, dropout_key)
        log_ratios, is_completion = log_ratios - reference[:, 0], num_tokens > 0
        # The estimate of the divergence has no gradient.
        frozen_lora = jax.lax.stop_gradient(lora)
        divergences = log_probs(frozen_lora, base, mismatched, dropout_key)[0]
        divergences -= reference[:, 1]
        # Negative estimates of the divergence, which cannot be negative, become 0.
        total, count = _sum_and_count(divergences, is_completion)
        kl = jnp.maximum(total / jnp.maximum(count, 1), 0)
        # `answers` is 1 at targets of good completions, and -1 at those of bad ones.
        is_good = jnp.sum(completions.answers, axis=-1).reshape(-1) > 0
        completion_losses = ql.losses.kto(log_ratios, is_good, kl, beta=beta)
        chosen, rejected = (
            jnp.stack(_sum_and_count(beta * log_ratios, is_completion & mask))
            for mask in (is_good, ~is_good)
        )
        # A batch without completions of both kinds has no margin: sum and count are 0.
        has_both = (chosen[1] > 0) & (rejected[1] > 0)
        margin = chosen[0] / chosen[1] - rejected[0] / rejected[1]
        margin = jnp.where(has_both, jnp.stack([margin, jnp.ones_like(margin)]), 0)
        metrics = {"kl": jnp.stack([kl * count, count]), "rewards/chosen": chosen}
        metrics |= {"rewards/rejected": rejected, "rewards/margins": margin}
        return *_sum_and_count(completion_losses, is_completion), metrics

    return loss


def _reward_metrics(
    rewards: Float[Array, "pairs 2"], is_pair: Bool[Array, " pairs"]
) -> dict[str, Array]:
    chosen, rejected = rewards.T
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": jnp.where(chosen > rejected, 1.0, 0.0),
    }
    return {k: jnp.stack(_sum_and_count(x, is_pair)) for k, x in metrics.items()}


def _completion_log_probs(
    losses: Float[Array, "B P"], batch: Batch
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns the log-probability of each completion, and its number of tokens."""
    mask = jnp.abs(jnp.asarray(batch.answers))  # [B, S, P], and N = B * S
    log_probs = -jnp.sum(losses[:, None] * mask, axis=-1)
    return log_probs.reshape(-1), jnp.sum(mask, axis=-1).reshape(-1)


def _sum_and_count(
    x: Float[Array, " n"], where: Bool[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return jnp.sum(jnp.where(where, x, 0)), jnp.sum(where, dtype=jnp.float32)


def _in_auto_axes(loss: Loss) -> Loss:
    """Allows a loss to be called on a mesh with Explicit axes."""

    @functools.wraps(loss)
    def call(*args):
        # The decoder relies on XLA to shard its products. With Explicit axes, each
        # product would have to state its sharding.
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            in_auto: Any = jax.sharding.auto_axes(loss, out_sharding=PartitionSpec())
            return in_auto(*args)
        return loss(*args)

    return call


def token_losses(model: Any) -> Callable[..., Any]:
    """Returns a function that computes the cross entropy of each target, `[B, P]`."""

    # If `mutable` names collections, the function returns them too.
    def compute_token_losses(lora, base, batch, dropout_key, mutable=False):
        result = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
            return_hidden=True,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=mutable,
        )
        # Only the hidden states that predict a target, `[B, P, D]`, reach the head.
        hidden, *collections = result if mutable else (result,)
        losses = ql.losses.chunked_cross_entropy(
            hidden,
            labels=jnp.asarray(batch.targets),
            **head_arguments(model.config, base, lora),
        )
        return (losses, *collections) if mutable else losses

    return compute_token_losses


def make_mean_loss(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], float]:
    """Returns `f(base, lora, batches)`: the mean loss per token, without dropout.

    Args:
        loss: As for `make_step`. It is called with the key None.

    Example:
        >>> import jax.numpy as jnp
        >>> from qlora_jax.llm import train
        >>> loss = lambda lora, base, batch, key: (jnp.sum(batch), batch.size)
        >>> train.make_mean_loss(loss)({}, {}, [jnp.ones(3), 5 * jnp.ones(1)])
        2.0
    """
    compute_means = make_means(loss)
    return lambda base, lora, batches: compute_means(base, lora, batches)["loss"]


def make_means(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], dict[str, float]]:
    """Returns `f(base, lora, batches)`: the mean `loss`, and means of its metrics."""
    evaluate = jax.jit(lambda lora, base, batch: loss(lora, base, batch, None))

    def compute_means(base, lora, batches):
        pairs: dict[str, list[tuple[Array, Array]]] = {}  # a sum and a count per batch
        for batch in batches:
            total, weight, *metrics = evaluate(lora, base, batch)
            for name, pair in {"loss": (total, weight), **dict(*metrics)}.items():
                pairs.setdefault(name, []).append(pair)
        # Sum in float64. `np.asarray` waits for results, so it comes after all batches.
        sums = {k: np.asarray(x, np.float64).sum(axis=0) for k, x in pairs.items()}
        with np.errstate(invalid="ignore"):  # a metric without entries has mean NaN
            return {name: float(x / n) for name, (x, n) in sums.items()}

    return compute_means
