"""Training: losses, optimizers, steps, states and results."""

from .loss_scale import LossScale
from .objectives import Objective, find_objective, register_objective
from .objectives.sft import decoder_loss
from .optimizer import make_optimizer, make_schedule
from .outputs import read_metrics
from .step import State, make_step

__all__ = [
    "LossScale",
    "Objective",
    "State",
    "decoder_loss",
    "find_objective",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "read_metrics",
    "register_objective",
]
