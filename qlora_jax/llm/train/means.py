"""Mean losses and metrics over batches, for evaluations."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from .step import Loss


def make_mean_loss(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], float]:
    """Returns a function that computes the mean loss of batches, without dropout.

    It is called as `f(base, lora, batches)`. The mean is over all target tokens, so it
    does not depend on how they are divided into batches.
    """
    compute_means = make_means(loss)
    return lambda base, lora, batches: compute_means(base, lora, batches)["loss"]


def make_means(loss: Loss) -> Callable[[Any, Any, Iterable[Any]], dict[str, float]]:
    """Returns `f(base, lora, batches)`, which computes the means of all metrics.

    Its result has the mean loss under the name "loss", and the mean of each metric that
    `loss` returns.
    """
    evaluate = jax.jit(lambda lora, base, batch: loss(lora, base, batch, None))

    def compute_means(base, lora, batches):
        # The sum and the count of each metric in each batch.
        sums: dict[str, list[tuple[Array, Array]]] = {}
        for batch in batches:
            total, count, *metrics = evaluate(lora, base, batch)
            # The loss may return no metrics: then `dict(*metrics)` is empty.
            for name, pair in {"loss": (total, count), **dict(*metrics)}.items():
                sums.setdefault(name, []).append(pair)
        if not sums:  # maybe a generator that has been used before
            raise ValueError("`batches` must have a batch. Got none.")
        # Add up in float64. `np.asarray` waits for the device, so it is called only
        # after all batches have been sent to it.
        totals = {k: np.asarray(x, np.float64).sum(axis=0) for k, x in sums.items()}
        with np.errstate(invalid="ignore"):  # a count of 0 gives NaN
            return {name: float(np.sum(x / n)) for name, (x, n) in totals.items()}

    return compute_means
