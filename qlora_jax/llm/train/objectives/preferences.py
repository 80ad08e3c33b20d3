"""Preferences between two answers: dpo, ipo, orpo and simpo.

The reference model is the base without the adapter. Its log-probabilities are computed
inside the step, without gradient, so no second model is in memory.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

import qlora_jax as ql

from ...data.batching import Batch
from ..step import Loss, SumOfMeans
from .registry import Objective, register_objective
from .sft import in_auto_axes, make_token_losses

_WITH_REFERENCE = ("dpo", "ipo")
_LENGTH_NORMALIZED = ("ipo", "orpo", "simpo")
_METRICS = ("rewards/chosen", "rewards/rejected")
_METRICS += ("rewards/margins", "rewards/accuracies")


def pair_loss(name: str, model: Any, *, beta: float = 0.1, **settings: float) -> Loss:
    """Returns the loss of an objective for pairs of answers, for `make_step`.

    The loss is a function that returns the sum of the losses of all pairs, their
    number, and the metrics of TRL. ORPO is a `SumOfMeans`, over pairs and over the
    target tokens of chosen answers. The reward of a completion is `beta` times its
    log-ratio. For an objective without a reference model, it is `beta` times the mean
    log-probability of the tokens.
    """
    compute_token_losses = make_token_losses(model)
    compute_pair_losses = getattr(ql.losses, name)
    uses_reference = name in _WITH_REFERENCE

    def loss(lora, base, batch, dropout_key):
        [losses] = compute_token_losses(lora, base, batch, dropout_key)  # [B, P]
        # Without a reference model, `log_ratios` stay log-probabilities.
        log_ratios, num_tokens = completion_log_probs(losses, batch)  # [B * S] each
        if uses_reference:
            [reference_losses] = compute_token_losses({}, base, batch, None)
            log_ratios -= completion_log_probs(reference_losses, batch)[0]
        means = log_ratios / jnp.maximum(num_tokens, 1)
        scores = means if name in _LENGTH_NORMALIZED else log_ratios
        # Chosen and rejected completions of the same prompt alternate.
        chosen, rejected = scores.reshape(-1, 2).T  # [B * S / 2] each
        options: dict[str, Any] = {"beta": beta, **settings}
        if name == "orpo":  # the cross entropy is a mean of its own
            options["nll"] = jnp.zeros(())
        pair_losses = compute_pair_losses(chosen, rejected, **options)
        rewards = beta * (log_ratios if uses_reference else means)
        is_pair = num_tokens[::2] > 0  # padding has no target tokens
        metrics = _reward_metrics(rewards.reshape(-1, 2), is_pair)
        total, count = sum_and_count(pair_losses, is_pair)
        if name == "orpo":  # `weights` are 0 for rejected completions
            total = jnp.stack([total, jnp.sum(losses * batch.weights)])
            count = _count_pairs_and_tokens(batch)
        return total, count, metrics

    loss = in_auto_axes(loss)
    return SumOfMeans(loss, _count_pairs_and_tokens) if name == "orpo" else loss


def _count_pairs_and_tokens(batch: Batch) -> Float[Array, " 2"]:
    is_chosen = jnp.any(jnp.asarray(batch.answers) > 0, axis=-1)  # [B, S]
    num_pairs = jnp.sum(is_chosen, dtype=jnp.float32)
    return jnp.stack([num_pairs, jnp.sum(batch.weights)])


def _reward_metrics(
    rewards: Float[Array, "pairs 2"], is_pair: Bool[Array, " pairs"]
) -> dict[str, Array]:
    chosen, rejected = rewards.T
    is_correct = jnp.where(chosen > rejected, 1.0, 0.0)
    values = chosen, rejected, chosen - rejected, is_correct
    sums = (jnp.stack(sum_and_count(x, is_pair)) for x in values)
    return dict(zip(_METRICS, sums, strict=True))


def completion_log_probs(
    losses: Float[Array, "B P"], batch: Batch
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns the log-probability of each completion, and its number of tokens."""
    # A row has S sequences. `answers` is 1 or -1 at the targets of a sequence, for a
    # good or a bad completion, and otherwise 0.
    mask = jnp.abs(jnp.asarray(batch.answers))  # [B, S, P]
    log_probs = -jnp.sum(losses[:, None] * mask, axis=-1)
    return log_probs.reshape(-1), jnp.sum(mask, axis=-1).reshape(-1)  # N is B * S


def sum_and_count(
    x: Float[Array, " n"], where: Bool[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of the selected values, and their number."""
    return jnp.sum(jnp.where(where, x, 0)), jnp.sum(where, dtype=jnp.float32)


def _register(name: str, *settings: str, may_train_on_all: bool = False) -> None:
    loss = functools.partial(pair_loss, name)
    register_objective(
        Objective(
            name,
            rows="pairs",
            loss=loss,
            settings=settings,
            metrics=_METRICS,
            may_train_on_all=may_train_on_all,
        )
    )


_register("dpo", "beta")
_register("ipo", "beta")
# ORPO adds the cross entropy of the chosen answers, which may include their prompts.
_register("orpo", "beta", may_train_on_all=True)
_register("simpo", "beta", "gamma")
