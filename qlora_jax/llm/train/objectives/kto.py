"""Kahneman-Tversky optimization, which learns from answers with a label."""

from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as ql

from ..step import Loss
from .preferences import completion_log_probs, sum_and_count
from .registry import Objective, register_objective
from .sft import in_auto_axes, make_token_losses


def kto_loss(model: Any, *, beta: float = 0.1) -> Loss:
    """Returns the loss of KTO, for `make_step`.

    The loss is a function that returns the sum of the losses of all completions, their
    number, and metrics.
    """
    compute_token_losses = make_token_losses(model)

    def log_probs(lora, base, batch, dropout_key):
        [losses] = compute_token_losses(lora, base, batch, dropout_key)
        return completion_log_probs(losses, batch)

    def loss(lora, base, batch, dropout_key):
        # Rows alternate between a prompt with its own completion, and the same prompt
        # with the completion of another row. The log-ratios of these mismatched
        # completions estimate the KL divergence.
        reference = log_probs({}, base, batch, None)[0].reshape(-1, 2)
        # Two batches of B / 2 rows each.
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
        # A divergence cannot be negative, so a negative estimate is replaced with 0.
        total, count = sum_and_count(divergences, is_completion)
        kl = jnp.maximum(total / jnp.maximum(count, 1), 0)
        # `answers` is 1 at targets of good completions, and -1 at those of bad ones.
        is_good = jnp.sum(completions.answers, axis=-1).reshape(-1) > 0
        completion_losses = ql.losses.kto(log_ratios, is_good, kl, beta=beta)
        chosen, rejected = (
            jnp.stack(sum_and_count(beta * log_ratios, is_completion & mask))
            for mask in (is_good, ~is_good)
        )
        # A batch that lacks good or bad completions has no margin: sum and count are 0.
        has_both = (chosen[1] > 0) & (rejected[1] > 0)
        margin = chosen[0] / chosen[1] - rejected[0] / rejected[1]
        margin = jnp.where(has_both, jnp.stack([margin, jnp.ones_like(margin)]), 0)
        metrics = {"kl": jnp.stack([kl * count, count]), "rewards/chosen": chosen}
        metrics |= {"rewards/rejected": rejected, "rewards/margins": margin}
        return *sum_and_count(completion_losses, is_completion), metrics

    return in_auto_axes(loss)


register_objective(
    Objective(
        name="kto",
        rows="labelled",
        loss=kto_loss,
        settings=("beta",),
        metrics=("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    )
)
