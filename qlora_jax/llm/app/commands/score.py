"""`qlora-jax score`: the mean loss of a model on data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from tqdm import tqdm

from ...data.batching import Batch, eval_batches
from ...train.means import make_mean_loss
from ...train.objectives.sft import decoder_loss
from ...train.outputs import plural
from ..as_trained import open_model_for, read_as_trained, training_load_options
from ..configs import ScoreConfig
from ..merge_aware import note_packing
from ..row_settings import read_rows_like_run


@dataclass(frozen=True)
class Score:
    """The result of `score`.

    Attributes:
        loss: The mean cross entropy of the target tokens, in nats per token.
        tokens: The number of target tokens.
        rows: The number of rows.
    """

    loss: float
    tokens: int
    rows: int

    def __str__(self):
        counts = f"{plural(self.tokens, 'token')} in {plural(self.rows, 'row')}"
        return f"loss {self.loss:.6f} nats a token ({counts})"


def score(config: ScoreConfig) -> Score:
    """Returns the loss of a model, with or without an adapter, on the rows of a file.

    Args:
        config: The model, the adapter and the rows.

    Raises:
        ValueError: If the model, the adapter or the data cannot be read or do not fit,
            if there is no target token, or if the loss is not finite.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax.llm import app
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> model = save_tiny(tempfile.mkdtemp())
        >>> data = pathlib.Path(model) / "rows.jsonl"
        >>> _ = data.write_text('{"text": "five"}')
        >>> app.score(app.ScoreConfig(model, str(data))).tokens
        3
    """
    model = open_model_for(config)
    load_options = training_load_options(config, model)
    note_packing(model.lora)
    # The rows are read before the weights, so that their errors are reported early.
    rows = read_rows_like_run(config, model)
    num_targets = sum(row.num_trained for row in rows)
    if not num_targets:
        raise ValueError("the rows must have at least one target token. Got none.")
    model = read_as_trained(model, load_options, config.dtype)
    wrapped = model.engine.make_model(dtype=jnp.dtype(config.dtype))
    # The chunked loss saves memory, but does not support an adapter of the head.
    has_adapted_head = model.engine.head_key in model.lora
    token_loss = _make_logits_loss if has_adapted_head else decoder_loss
    mean_loss = make_mean_loss(token_loss(wrapped))
    # A longer row makes all batches longer.
    width = max([config.batch_tokens, *(len(row.ids) for row in rows)])
    packing = model.engine.can_pack_rows
    batches = eval_batches(rows, batch_size=1, max_length=width, packing=packing)
    bar = tqdm(batches, "scoring", unit=" batches", disable=None)
    loss = mean_loss(model.base, model.lora, bar)
    if not math.isfinite(loss):
        raise ValueError(f"the loss must be finite. Got {loss}.")
    return Score(loss, num_targets, len(rows))


def _make_logits_loss(model: Any) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns the loss of `decoder_loss`, computed on all logits at once."""

    def compute_loss(
        lora: PyTree, base: PyTree, batch: Batch, key: None
    ) -> tuple[jax.Array, jax.Array]:
        del key  # there is no dropout
        logits = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
        )
        # [rows, selected, vocabulary] -> [rows, selected]
        targets = jnp.asarray(batch.targets)[..., None]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, -1)
        return -jnp.sum(log_probs[..., 0] * batch.weights), jnp.sum(batch.weights)

    return compute_loss
