"""`qlora-jax score`: the mean loss of a model on data."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import qlora_jax as ql

from .._jax.progress import plural, progress_bar
from ..models.decoder import Decoder
from .base_model import BaseModel, open_adapted, read_as_trained
from .configs import ScoreConfig


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Attributes:
        loss: Mean cross entropy of the tokens that count, in nats a token.
        tokens: Number of tokens that count.
        rows: Number of rows.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Score(loss=0.5, tokens=1200, rows=3))
        loss 0.500000 nats a token (1,200 tokens in 3 rows)
    """

    loss: float
    tokens: int
    rows: int

    def __str__(self):
        counts = f"{plural(self.tokens, 'token')} in {plural(self.rows, 'row')}"
        return f"loss {self.loss:.6f} nats a token ({counts})"


@dataclass(frozen=True)
class Scores:
    """The result of `score` for several adapters.

    Attributes:
        scores: The score of each, by its name in the config.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.Scores({"run/adapter": cli.Score(0.5, tokens=1200, rows=3)}))
        run/adapter: loss 0.500000 nats a token (1,200 tokens in 3 rows)
    """

    scores: Mapping[str, Score]

    def __str__(self):
        return "\n".join(f"{name}: {score}" for name, score in self.scores.items())


def score(config: ScoreConfig) -> Score | Scores:
    """Returns the loss of a model, with or without an adapter, on the rows of a file.

    Several adapters are scored on one base, which is read once.

    Args:
        config: The model, the data and the settings.

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
    model, several, how = open_adapted(config)
    score = scorer(model, str(config.data), config.batch_tokens, config.dtype)
    model = read_as_trained(model, how, config.dtype)
    if not several:
        return score(model.base, model.lora)
    return Scores({name: score(model.base, x) for name, x in several.items()})


def scorer(
    model: BaseModel, data: str, batch_tokens: int = 1024, dtype: str = "float32"
) -> Callable[[Any, Any], Score]:
    """Reads rows, and returns a function that scores a base and a lora tree on them."""
    rows = ql.train.read_rows(
        data,
        ql.train.open_tokenizer(model.path),
        vocab_size=model.config.vocab_size,
        max_length=batch_tokens,
    )
    tokens = sum(row.num_trained for row in rows)
    if not tokens:
        raise ValueError(f"{data} must have a token that counts. Got none.")
    batches = []
    for is_packed in (True, False):  # longer rows are alone
        some = [x for x in rows if (len(x.ids) <= batch_tokens) == is_packed]
        size = max([batch_tokens, *(len(row.ids) for row in some)])
        batches += some and ql.train.eval_batches(
            some, batch_size=1, max_length=size, packing=is_packed
        )
    decoder = Decoder(model.config, dtype=jnp.dtype(dtype))
    wrapped = ql.linen.wrap(decoder, scanned=decoder.scanned)
    chunked = ql.train.make_mean_loss(ql.train.decoder_loss(wrapped))
    from_logits = ql.train.make_mean_loss(_logits_loss(wrapped))
    head = "embed_tokens" if model.config.tie_embeddings else "lm_head"

    def score(base: Any, lora: Any) -> Score:
        shown = progress_bar("scoring", " batches", iterable=batches)
        # The chunked loss takes a frozen head: it has no gradient for a trained one.
        loss = (from_logits if head in lora else chunked)(base, lora, shown)
        if not math.isfinite(loss):
            raise ValueError(f"the loss must be finite. Got {loss}.")
        return Score(loss, tokens, len(rows))

    return score


def _logits_loss(model: Any) -> Callable[..., tuple]:
    """Returns the loss of `ql.train.decoder_loss`, computed on all logits at once."""

    def loss(lora: Any, base: Any, batch: "ql.train.Batch", key: None) -> tuple:
        del key  # nothing is dropped
        logits = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
        )
        targets = jnp.asarray(batch.targets)[..., None]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, -1)
        return -jnp.sum(log_probs[..., 0] * batch.weights), jnp.sum(batch.weights)

    return loss
