"""The loss of a decoder, and its mean over rows."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

import qlora_jax as ql

from ..models.decoder import head_arguments
from .data.batching import Batch

Loss = Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]


def decoder_loss(model: Any) -> Loss:
    """Returns the loss of a decoder on a batch, for `make_step`.

    Args:
        model: A decoder of `qlora_jax.models`, wrapped by `qlora_jax.linen.wrap`.

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

    def loss(lora: Any, base: Any, batch: Batch, key: Any):
        # A decoder is written for axes that XLA splits.
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            run: Callable = jax.sharding.auto_axes(loss, out_sharding=PartitionSpec())
            return run(lora, base, batch, key)
        hidden = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
            return_hidden=True,
            rngs=None if key is None else {"dropout": key},
        )
        losses = ql.losses.chunked_cross_entropy(
            hidden,
            labels=jnp.asarray(batch.targets),
            **head_arguments(model.config, base, lora),
        )
        return jnp.sum(losses * batch.weights), jnp.sum(batch.weights)

    return loss


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
    run = jax.jit(lambda lora, base, batch: loss(lora, base, batch, None))

    def mean_loss(base: Any, lora: Any, batches: Iterable[Any]) -> float:
        found = [run(lora, base, batch) for batch in batches]
        total, weight = np.asarray(found, np.float64).sum(axis=0)
        return float(total / weight)

    return mean_loss
