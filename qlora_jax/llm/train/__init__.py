"""Training: losses, optimizers, steps, states and results."""

from .loop import Best, Loop, fit
from .means import make_mean_loss
from .objectives import Objective, find_objective, register_objective
from .objectives.sft import decoder_loss
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
    "Objective",
    "Report",
    "State",
    "Step",
    "decoder_loss",
    "find_objective",
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
    "read_metrics",
    "register_objective",
    "save_adapter",
]
