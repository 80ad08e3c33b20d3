"""Losses of a decoder on a batch, and their means over batches."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

import qlora_jax as ql

from ..models.decoder import head_arguments
from ..models.experts import balance_loss
from .data.batching import Batch

# Returns the sum of the losses of what is trained, its number, and perhaps metrics.
Loss = Callable[..., tuple]


def decoder_loss(model: Any, balance: float = 0.0) -> Loss:
    """Returns the loss of a decoder on a batch, for `make_step`.

    Args:
        model: A decoder of `qlora_jax.models`, wrapped by `qlora_jax.linen.wrap`.
        balance: Factor of the loss that balances the loads of experts, transformers'
            `router_aux_loss_coef`. It is added to the mean over the trained tokens.

    Returns:
        A function of the lora tree, the base tree, a `Batch` and a PRNG key for the
        adapters' dropout, or None. It returns the sum of the losses of the trained
        tokens, in nats, and their number. Explicit axes of a mesh are Auto in it.

    Example:
        >>> import jax, numpy as np, qlora_jax as ql
        >>> from qlora_jax import train
        >>> from qlora_jax.models.config import DecoderConfig
        >>> from qlora_jax.models.decoder import Decoder
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> row = np.arange(4, dtype=np.int32)[None]
        >>> batch = train.Batch(row, row * 0 + 1, row, row, row, np.ones((1, 4)))
        >>> base = Decoder(config).init(jax.random.key(0), row)["params"]
        >>> loss = train.decoder_loss(ql.linen.wrap(Decoder(config)))
        >>> total, tokens = loss({}, base, batch, None)
        >>> total.shape, float(tokens)
        ((), 4.0)
    """
    losses = token_losses(model)
    if balance and (model.config.experts is None or model.mlp_tile is not None):
        raise ValueError(
            "`balance` must be 0 for a decoder without experts, or with `mlp_tile`. "
            f"Got {balance}."
        )

    def loss(lora: Any, base: Any, batch: Batch, key: Any):
        count = jnp.sum(batch.weights)
        if not balance:
            return jnp.sum(losses(lora, base, batch, key) * batch.weights), count
        found, made = losses(lora, base, batch, key, mutable="router")
        (logits,) = made["router"]["layers"]["mlp"]["logits"]
        is_token = (batch.segment_ids != 0).reshape(-1).astype(jnp.float32)
        added = balance * balance_loss(logits, is_token, model.config.experts)
        return jnp.sum(found * batch.weights) + added * count, count

    return in_auto_axes(loss)


def in_auto_axes(loss: Loss) -> Loss:
    """Returns a loss that may be called where axes of a mesh are Explicit."""

    @functools.wraps(loss)
    def run(*args: Any) -> tuple:
        # A decoder is written for axes that XLA splits.
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            split: Any = jax.sharding.auto_axes(loss, out_sharding=PartitionSpec())
            return split(*args)
        return loss(*args)

    return run


def token_losses(model: Any) -> Callable[..., Float[Array, "B P"]]:
    """Returns the function of the cross entropies at a batch's selected places.

    If collections are `mutable`, it returns them too.
    """

    def losses(
        lora: Any, base: Any, batch: Batch, key: Any, mutable: Any = False
    ) -> Any:
        hidden = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
            return_hidden=True,
            rngs=None if key is None else {"dropout": key},
            mutable=mutable,
        )
        hidden, *made = hidden if mutable else (hidden,)
        found = ql.losses.chunked_cross_entropy(
            hidden,
            labels=jnp.asarray(batch.targets),
            **head_arguments(model.config, base, lora),
        )
        return (found, *made) if mutable else found

    return losses


def make_mean_loss(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], float]:
    """Returns `f(base, lora, batches)`: the mean loss in nats a token, without dropout.

    Args:
        loss: As for `make_step`; it is given no key.

    Example:
        >>> import jax.numpy as jnp
        >>> from qlora_jax import train
        >>> loss = lambda lora, base, batch, key: (jnp.sum(batch), batch.size)
        >>> train.make_mean_loss(loss)({}, {}, [jnp.ones(3), 5 * jnp.ones(1)])
        2.0
    """
    means = make_means(loss)
    return lambda base, lora, batches: means(base, lora, batches)["loss"]


def make_means(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], dict[str, float]]:
    """Returns the function of the mean `loss`, and of the means of its metrics."""
    run = jax.jit(lambda lora, base, batch: loss(lora, base, batch, None))

    def means(base: Any, lora: Any, batches: Iterable[Any]) -> dict[str, float]:
        found: dict[str, list] = {}
        for batch in batches:
            total, weight, *metrics = run(lora, base, batch)
            for name, pair in {"loss": (total, weight), **dict(*metrics)}.items():
                found.setdefault(name, []).append(pair)
        sums = {k: np.asarray(x, np.float64).sum(axis=0) for k, x in found.items()}
        with np.errstate(invalid="ignore"):  # NaN where there is nothing to count
            return {name: float(x / n) for name, (x, n) in sums.items()}

    return means
