"""Fine-tuning on data of one's own: rows, chat templates, batches, steps, states."""

import importlib
from typing import TYPE_CHECKING, Any

from .batches import Batch, batches, eval_batches
from .encode import Dataset, Example, Row, read_dataset, read_rows
from .templates import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from .loop import Loop, fit
    from .objective import decoder_loss, make_mean_loss
    from .optimizer import make_optimizer, make_schedule
    from .outputs import model_card, save_adapter
    from .report import Metrics, memory_of, plot_loss, read_metrics
    from .state import Checkpoints
    from .step import Report, State, make_step
    from .targets import add_adapters, find_target_paths

__all__ = [
    "Batch",
    "Checkpoints",
    "Dataset",
    "Example",
    "Loop",
    "Metrics",
    "Report",
    "Row",
    "State",
    "Tokenizer",
    "add_adapters",
    "batches",
    "decoder_loss",
    "eval_batches",
    "find_target_paths",
    "fit",
    "make_mean_loss",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "memory_of",
    "model_card",
    "open_tokenizer",
    "plot_loss",
    "read_dataset",
    "read_metrics",
    "read_rows",
    "save_adapter",
]

# Loaded on first use, so that reading rows needs no Optax.
_HOMES = {
    "Checkpoints": "state",
    "Loop": "loop",
    "Metrics": "report",
    "Report": "step",
    "State": "step",
    "add_adapters": "targets",
    "decoder_loss": "objective",
    "find_target_paths": "targets",
    "fit": "loop",
    "make_mean_loss": "objective",
    "make_optimizer": "optimizer",
    "make_schedule": "optimizer",
    "make_step": "step",
    "memory_of": "report",
    "model_card": "outputs",
    "plot_loss": "report",
    "read_metrics": "report",
    "save_adapter": "outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
