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
    from .checking import Checked, check
    from .contents import Contents, Leaf, inspect
    from .generating import Answer, Generated, generate
    from .pairing import Pair
    from .preview import Preview
    from .repacking import FileLosses, Repacked
    from .run_results import TrainResult
    from .scoring import Score, score
    from .training import train
    from .writing import Written, export

__all__ = [
    "Answer",
    "CheckConfig",
    "Checked",
    "Contents",
    "ExportConfig",
    "FileLosses",
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
        "checking",
        "contents",
        "generating",
        "pairing",
        "preview",
        "repacking",
        "run_results",
        "scoring",
        "training",
        "writing",
    ],
)
