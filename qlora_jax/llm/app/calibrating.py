"""Measures the inputs of a model's layers on data, for the search of scales."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

import qlora_jax as ql

from ..data.batching import Batch
from ..data.encode import Row
from ..models.decoder import Decoder
from ..train.objectives.sft import decoder_loss
from .base_model import LAYERS, BaseModel

BATCH_WIDTH = 1024  # tokens per batch
_MAX_BATCHES = 64  # more would hardly change the mean squares of the inputs


def make_calibrator(
    model: BaseModel, rows: Sequence[Row]
) -> Callable[[PyTree], PyTree]:
    """Returns a function that measures the inputs of a model's layers on rows.

    The function takes the parameters of the model, with the layers in float. It returns
    the mean squares of their inputs, which `ql.quantize` takes as `importance`.
    """
    batches = [*_make_batches(rows)]
    # The selected batches are spread evenly, because neighboring rows may be alike.
    count = min(len(batches), _MAX_BATCHES)
    batches = [batches[i * len(batches) // count] for i in range(count)]
    decoder = Decoder(model.decoder)
    loss = decoder_loss(ql.linen.wrap(decoder, scanned=decoder.scanned))

    def apply_model(base: PyTree, lora: PyTree, batch: Batch) -> jax.Array:
        return loss(lora, base, batch, None)[0]

    def calibrate(params: PyTree) -> PyTree:
        # `ql.calibrate` measures the kernels with adapters, but does not apply these.
        config = ql.QLoRAConfig(fmt=None, rank=1, targets=LAYERS)
        base, lora = ql.init(jax.random.key(0), params, config)
        bar = tqdm(batches, "calibrating", unit=" batches", disable=None)
        return ql.calibrate(apply_model, base, lora, bar)

    return calibrate


def _make_batches(rows: Sequence[Row]) -> Iterator[Batch]:
    """Yields batches of one row of `BATCH_WIDTH` tokens each, without padding.

    The rows are concatenated and cut into such batches, so that a row may be divided
    between two of them. Tokens that do not fill the last batch are dropped. If all rows
    together have fewer tokens than one batch, there is one shorter batch.
    """
    # There is no padding, because inputs at padding would be measured as well.
    ids = np.concatenate([row.ids for row in rows]).astype(np.int32)
    positions = np.concatenate([np.arange(len(row.ids)) for row in rows])
    row_numbers = np.repeat(np.arange(len(rows)), [len(row.ids) for row in rows])
    width = min(BATCH_WIDTH, len(ids))
    select = np.arange(width, dtype=np.int32)[None]
    for start in range(0, len(ids) - width + 1, width):
        part = slice(start, start + width)
        # The number of a sequence in its batch, from 1 on.
        segment_ids = row_numbers[part] - row_numbers[start] + 1
        # What is predicted does not matter, so a token is its own target.
        yield Batch(
            ids=ids[None, part],
            segment_ids=segment_ids[None].astype(np.int32),
            positions=positions[None, part].astype(np.int32),
            select=select,
            targets=ids[None, part],
            weights=np.ones((1, width), np.float32),
        )
