"""The commands of `qlora-jax` as functions, and their settings."""

from typing import TYPE_CHECKING

from ..lazy import make_getattr
from .configs import (
    CheckConfig,
    ExportConfig,
    GenerateConfig,
    ScoreConfig,
)
from .train_config import TrainConfig

if TYPE_CHECKING:
    from .commands.check import check
    from .commands.export import export
    from .commands.generate import generate
    from .commands.score import score
    from .commands.train import train

__all__ = [
    "CheckConfig",
    "ExportConfig",
    "GenerateConfig",
    "ScoreConfig",
    "TrainConfig",
    "check",
    "export",
    "generate",
    "score",
    "train",
]

# The functions import Flax and Optax, which `--help` does not need.
__getattr__ = make_getattr(
    __name__,
    __all__,
    [
        "commands.check",
        "commands.export",
        "commands.generate",
        "commands.score",
        "commands.train",
    ],
)
