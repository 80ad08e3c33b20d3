"""Training: losses, optimizers, steps, states and results."""

from .callbacks import (
    Best,
    CheckFinite,
    Evaluate,
    ForMembers,
    LogRows,
    SaveStates,
    ShowProgress,
)
from .loop import Callback, Training, fit
from .objective import decoder_loss, make_mean_loss, preference_loss
from .optimizer import make_optimizer, make_schedule
from .outputs import (
    Metrics,
    memory_of,
    model_card,
    plot_loss,
    plot_losses,
    read_metrics,
    save_adapter,
)
from .state import Checkpoints
from .step import Report, State, Step, make_step
from .target_modules import find_target_paths

__all__ = [
    "Best",
    "Callback",
    "CheckFinite",
    "Checkpoints",
    "Evaluate",
    "ForMembers",
    "LogRows",
    "Metrics",
    "Report",
    "SaveStates",
    "ShowProgress",
    "State",
    "Step",
    "Training",
    "decoder_loss",
    "find_target_paths",
    "fit",
    "make_mean_loss",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "memory_of",
    "model_card",
    "plot_loss",
    "plot_losses",
    "preference_loss",
    "read_metrics",
    "save_adapter",
]
