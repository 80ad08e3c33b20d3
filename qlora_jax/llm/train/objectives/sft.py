"""Supervised fine-tuning: the cross entropy of the target tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

import qlora_jax as ql

from ...models.decoder import head_arguments
from ...models.experts import balance_loss
from ...models.torch_decoder import TorchDecoder
from ..step import Loss
from .registry import Objective, register_objective

# A function of the arguments of a `Loss`, and of `mutable`, as in Flax. It returns a
# tuple: the loss of each target, `[B, P]`, and with `mutable` the changed variables.
TargetLosses = Callable[..., tuple]


def decoder_loss(model: Any, balance: float = 0.0) -> Loss:
    """Returns the loss of a decoder on a batch, for `make_step`.

    Args:
        model: A decoder of `qlora_jax.llm.models`, wrapped by `qlora_jax.linen.wrap`.
        balance: The factor of the load-balancing loss of the experts, which is added to
            the mean loss. In transformers: `router_aux_loss_coef`.

    Returns:
        A function of the lora tree, the base tree, a `Batch`, and a PRNG key for
        dropout or None. It returns the sum of the losses of the target tokens, in
        nats, and their number. It may be called on a mesh with Explicit axes, which it
        treats as Auto axes.

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
    return make_summed_loss(model, make_token_losses(model), balance)


def make_summed_loss(model: Any, compute_losses: TargetLosses, balance: float) -> Loss:
    """Returns a loss, for `make_step`, that sums the results of `compute_losses`.

    `balance` is that of `decoder_loss`.
    """
    if balance and (model.config.experts is None or model.mlp_tile is not None):
        raise ValueError(
            "`balance` must be 0 for a decoder without experts, or with `mlp_tile`. "
            f"Got {balance}."
        )

    def loss(lora, base, batch, dropout_key):
        mutable = "router" if balance else False
        losses, *changed = compute_losses(lora, base, batch, dropout_key, mutable)
        total, count = jnp.sum(losses * batch.weights), jnp.sum(batch.weights)
        if balance:
            # One array [L, B * T, E] for each stack of layers with experts.
            logits = jnp.concatenate(jax.tree.leaves(changed[0]["router"]))
            is_token = (batch.segment_ids != 0).reshape(-1)  # [B * T]
            weights = is_token.astype(jnp.float32)
            penalty = balance * balance_loss(logits, weights, model.config.experts)
            # The step divides the total by `count`, but the penalty is not a sum over
            # targets, so it is multiplied by `count` first.
            total += penalty * count
        return total, count

    return in_auto_axes(loss)


def make_token_losses(model: Any) -> TargetLosses:
    """Returns a function that computes the cross entropy of each target."""

    def compute_token_losses(lora, base, batch, dropout_key, mutable=False):
        arguments = lora, base, batch, dropout_key
        hidden, *changed = hidden_states(model, *arguments, mutable)
        if isinstance(model, TorchDecoder):  # PyTorch's code computes the logits
            variables = {"params": base, "lora": lora}
            return (model.target_losses(variables, hidden, batch.targets, dropout_key),)
        head = head_arguments(model.config, base, lora)
        labels = jnp.asarray(batch.targets)
        losses = ql.losses.chunked_cross_entropy(hidden, labels=labels, **head)
        return losses, *changed

    return compute_token_losses


def hidden_states(model, lora, base, batch, dropout_key, mutable=False) -> tuple:
    """Returns the hidden states `[B, P, D]` from which targets are predicted.

    The result is a tuple. With `mutable`, a dict of the changed variables follows.
    """
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
    return result if mutable else (result,)


def in_auto_axes(loss: Loss) -> Loss:
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


register_objective(
    Objective(
        name="sft",
        rows="texts",
        loss=decoder_loss,
        is_cross_entropy=True,
        balances_experts=True,
        may_train_on_all=True,
    )
)
