"""The commands of `qlora-jax` as functions, and their settings."""

from typing import TYPE_CHECKING

from ..lazy import make_getattr
from .configs import (
    CheckConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    ScoreConfig,
)
from .train_config import TrainConfig

if TYPE_CHECKING:
    from .commands.check import Checked, check
    from .commands.export import Written, export
    from .commands.generate import Answer, Generated, generate
    from .commands.inspect import Contents, Leaf, inspect
    from .commands.score import Score, score
    from .commands.train import train
    from .exporting.pairing import Pair
    from .exporting.repacking import Repacked
    from .training.preview import Preview
    from .training.results import TrainResult

__all__ = [
    "Answer",
    "CheckConfig",
    "Checked",
    "Contents",
    "ExportConfig",
    "GenerateConfig",
    "Generated",
    "InspectConfig",
    "Leaf",
    "Pair",
    "Preview",
    "Repacked",
    "Score",
    "ScoreConfig",
    "TrainConfig",
    "TrainResult",
    "Written",
    "check",
    "export",
    "generate",
    "inspect",
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
        "commands.inspect",
        "commands.score",
        "commands.train",
        "exporting.pairing",
        "exporting.repacking",
        "training.preview",
        "training.results",
    ],
)
