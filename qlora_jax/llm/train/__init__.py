"""Training: losses, optimizers, steps, states and results."""

from .loop import Best, Loop, fit
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
from .step import JointStep, Report, State, Step, make_joint_step, make_step
from .target_modules import find_target_paths

__all__ = [
    "Best",
    "Checkpoints",
    "JointStep",
    "Loop",
    "Metrics",
    "Report",
    "State",
    "Step",
    "decoder_loss",
    "find_target_paths",
    "fit",
    "make_joint_step",
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
