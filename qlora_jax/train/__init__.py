"""Fine-tuning on data of one's own: rows, chat templates, batches, steps, states."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.batching import Batch, batches, eval_batches
    from .data.chat_tokenizer import Tokenizer, open_tokenizer
    from .data.dataset import Dataset, read_dataset, read_rows
    from .data.encode import Example, Row
    from .loop import Loop, fit
    from .objective import decoder_loss, make_mean_loss
    from .optimizer import make_optimizer, make_schedule
    from .outputs import model_card, save_adapter
    from .report import Metrics, memory_of, plot_loss, read_metrics
    from .state import Checkpoints
    from .step import Report, State, Step, make_step
    from .target_modules import find_target_paths

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
    "Step",
    "Tokenizer",
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

# Loaded on first use, so that reading rows needs no Grain, and so on.
_HOMES = {
    "Batch": "data.batching",
    "Checkpoints": "state",
    "Dataset": "data.dataset",
    "Example": "data.encode",
    "Loop": "loop",
    "Metrics": "report",
    "Report": "step",
    "Row": "data.encode",
    "State": "step",
    "Step": "step",
    "Tokenizer": "data.chat_tokenizer",
    "batches": "data.batching",
    "decoder_loss": "objective",
    "eval_batches": "data.batching",
    "find_target_paths": "target_modules",
    "fit": "loop",
    "make_mean_loss": "objective",
    "make_optimizer": "optimizer",
    "make_schedule": "optimizer",
    "make_step": "step",
    "memory_of": "report",
    "model_card": "outputs",
    "open_tokenizer": "data.chat_tokenizer",
    "plot_loss": "report",
    "read_dataset": "data.dataset",
    "read_metrics": "report",
    "read_rows": "data.dataset",
    "save_adapter": "outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
