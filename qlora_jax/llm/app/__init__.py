"""The commands of `qlora-jax` as functions, and their settings."""

from .checking import Checked, check
from .configs import (
    CheckConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    ModelsConfig,
    PairsConfig,
    ScoreConfig,
)
from .contents import Contents, Leaf, inspect
from .generating import Answer, Generated, generate
from .models import ModelFamily, Models, models
from .pairs import Pair, Pairs, pairs
from .preview import Preview
from .repacking import FileLosses, Repacked
from .run_results import SweepResult, TrainResult
from .scoring import Score, Scores, score
from .train_config import TrainConfig
from .train_groups import (
    AdapterConfig,
    DataConfig,
    DevicesConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TrainingConfig,
)
from .training import train
from .writing import Written, export

__all__ = [
    "AdapterConfig",
    "Answer",
    "CheckConfig",
    "Checked",
    "Contents",
    "DataConfig",
    "DevicesConfig",
    "EvaluationConfig",
    "ExportConfig",
    "FileLosses",
    "GenerateConfig",
    "Generated",
    "InspectConfig",
    "Leaf",
    "ModelConfig",
    "ModelFamily",
    "Models",
    "ModelsConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Pair",
    "Pairs",
    "PairsConfig",
    "Preview",
    "Repacked",
    "Score",
    "ScoreConfig",
    "Scores",
    "SweepResult",
    "TrainConfig",
    "TrainResult",
    "TrainingConfig",
    "Written",
    "check",
    "export",
    "generate",
    "inspect",
    "models",
    "pairs",
    "score",
    "train",
]
