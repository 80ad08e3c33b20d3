"""The command line, and what its commands do as Python calls."""

import importlib
from typing import TYPE_CHECKING, Any

from .configs import (
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    QuantizeConfig,
    ScoreConfig,
)
from .train_config import TrainConfig

if TYPE_CHECKING:
    from .contents import Contents, Leaf, inspect
    from .generating import Answer, Generated, generate
    from .run_results import TrainResult
    from .scoring import Score, score
    from .training import train
    from .writing import Written, export, merge, quantize

__all__ = [
    "Answer",
    "Contents",
    "ExportConfig",
    "GenerateConfig",
    "Generated",
    "InspectConfig",
    "Leaf",
    "MergeConfig",
    "QuantizeConfig",
    "Score",
    "ScoreConfig",
    "TrainConfig",
    "TrainResult",
    "Written",
    "export",
    "generate",
    "inspect",
    "merge",
    "quantize",
    "score",
    "train",
]

# What loads Flax and models, on first use.
_HOMES = {
    "Answer": "generating",
    "Contents": "contents",
    "Generated": "generating",
    "Leaf": "contents",
    "Score": "scoring",
    "TrainResult": "run_results",
    "Written": "writing",
    "export": "writing",
    "generate": "generating",
    "inspect": "contents",
    "merge": "writing",
    "quantize": "writing",
    "score": "scoring",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
