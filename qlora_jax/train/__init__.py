"""Fine-tuning on data of one's own: rows, chat templates, batches."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch
    from .batching import batches, eval_batches
    from .dataset import Dataset, read_dataset, read_rows
    from .records import Example, Row
    from .templates import Tokenizer, open_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Example",
    "Row",
    "Tokenizer",
    "batches",
    "eval_batches",
    "open_tokenizer",
    "read_dataset",
    "read_rows",
]

# Loaded on first use, so that reading rows needs no Grain, and so on.
_HOMES = {
    "Batch": "batch",
    "Dataset": "dataset",
    "Example": "records",
    "Row": "records",
    "Tokenizer": "templates",
    "batches": "batching",
    "eval_batches": "batching",
    "open_tokenizer": "templates",
    "read_dataset": "dataset",
    "read_rows": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
