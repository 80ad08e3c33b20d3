"""The learning rate that settings ask for."""

from typing import Any

import qlora_jax as ql

from .train_config import TrainConfig


def make_schedule(config: TrainConfig) -> Any:
    """Returns the learning rate, a function of the step."""
    return ql.train.make_schedule(
        config.schedule,
        config.learning_rate,
        config.steps or 1,
        warmup=config.warmup or 0,
        end=config.end_learning_rate,
        decay=config.decay,
    )
