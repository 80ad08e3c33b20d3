"""Training: losses, optimizers, steps, states and results."""

from .loss_scale import LossScale
from .means import make_mean_loss
from .objectives import Objective, find_objective, register_objective
from .objectives.sft import decoder_loss
from .optimizer import make_optimizer, make_schedule
from .outputs import read_metrics
from .step import Report, State, SumOfMeans, make_step

__all__ = [
    "LossScale",
    "Objective",
    "Report",
    "State",
    "SumOfMeans",
    "decoder_loss",
    "find_objective",
    "make_mean_loss",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "read_metrics",
    "register_objective",
]
