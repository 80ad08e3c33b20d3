"""Fine-tuning on data of one's own: rows, chat templates, batches."""

from .batches import Batch, batches, eval_batches
from .encode import Dataset, Example, Row, read_dataset, read_rows
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
