"""`qlora-jax score`: the mean loss of a model on data."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import qlora_jax as ql

from ..models.decoder import Decoder
from ..train.data.encode import IGNORED
from .configs import ScoreConfig
from .data import Batch, batches
from .model import open_adapter, open_model


@dataclass(frozen=True)
class Score:
    """What `score` found.

    Attributes:
        loss: Mean cross entropy of the tokens that count, in nats a token.
        tokens: How many tokens counted.
        rows: How many rows the data had.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Score(loss=0.5, tokens=1200, rows=3))
        loss 0.500000 nats a token (1,200 tokens in 3 rows)
    """

    loss: float
    tokens: int
    rows: int

    def __str__(self):
        return (
            f"loss {self.loss:.6f} nats a token ({self.tokens:,} tokens in "
            f"{self.rows:,} rows)"
        )


def score(config: ScoreConfig) -> Score:
    """Scores a model, with or without an adapter, on the rows of a file.

    Args:
        config: The model, the data and the rest.

    Returns:
        The loss and what it was computed on.

    Raises:
        ValueError: If the model, the adapter or the data cannot be read or do not fit,
            if no token counts, or if the loss is not finite.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import cli
        >>> from qlora_jax.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> data = pathlib.Path(model) / "rows.jsonl"
        >>> _ = data.write_text('{"text": "five"}')
        >>> cli.score(cli.ScoreConfig(model, str(data))).tokens
        3
    """
    model = open_model(config.model, dtype=config.dtype)
    rows = ql.train.read_rows(
        config.data,
        ql.train.open_tokenizer(model.path),
        vocab_size=model.config.vocab_size,
        max_length=config.batch_tokens,
    )
    tokens = sum(row.num_trained for row in rows)
    if not tokens:
        raise ValueError(f"{config.data} must have a token that counts. Got none.")
    base, lora, _ = open_adapter(model, config.adapter)
    decoder = Decoder(model.config, dtype=jnp.dtype(config.dtype))
    wrapped = ql.linen.wrap(decoder, scanned=decoder.scanned)
    run = jax.jit(functools.partial(_losses, wrapped))
    total = 0.0
    with tqdm(total=len(rows), desc="scoring", unit=" rows", disable=None) as bar:
        for batch in batches(rows, config.batch_tokens):
            losses = run({"params": base, "lora": lora}, batch)
            total += float(np.asarray(losses, np.float64).sum())
            bar.update(int(batch.is_token.any(axis=1).sum()))
    loss = total / tokens
    if not math.isfinite(loss):
        raise ValueError(f"the loss must be finite. Got {loss}.")
    return Score(loss, tokens, len(rows))


def _losses(model: Any, variables: Any, batch: Batch) -> jax.Array:
    """Returns the loss of each token in nats, zero where it does not count."""
    segments = batch.is_token.astype(jnp.int32)  # padding is a sequence of its own
    logits = model.apply(variables, batch.ids, segment_ids=segments)[:, :-1]
    labels = batch.labels[:, 1:]
    counts = labels != IGNORED
    chosen = jnp.where(counts, labels, 0)[..., None]
    chosen = jnp.take_along_axis(logits, chosen, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.where(counts, losses, 0)
