"""Training: losses, optimizers, steps, states and results."""

from .callbacks import (
    Best,
    CheckFinite,
    Evaluate,
    LogRows,
    SaveStates,
    ShowProgress,
)
from .checkpoints import Checkpoints
from .loop import Callback, Training, fit
from .loss_scale import LossScale
from .means import make_mean_loss
from .objectives import Objective, find_objective, register_objective
from .objectives.sft import decoder_loss
from .optimizer import make_optimizer, make_schedule
from .outputs import (
    Metrics,
    memory_of,
    model_card,
    plot_loss,
    read_metrics,
    save_adapter,
)
from .step import Report, State, SumOfMeans, make_step
from .target_modules import find_target_paths

__all__ = [
    "Best",
    "Callback",
    "CheckFinite",
    "Checkpoints",
    "Evaluate",
    "LogRows",
    "LossScale",
    "Metrics",
    "Objective",
    "Report",
    "SaveStates",
    "ShowProgress",
    "State",
    "SumOfMeans",
    "Training",
    "decoder_loss",
    "find_objective",
    "find_target_paths",
    "fit",
    "make_mean_loss",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "memory_of",
    "model_card",
    "plot_loss",
    "read_metrics",
    "register_objective",
    "save_adapter",
]
