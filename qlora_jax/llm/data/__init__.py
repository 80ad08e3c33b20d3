"""Rows of data: chat templates, tokens, targets and batches."""

from .batching import Batch, batches, eval_batches
from .chat_tokenizer import Tokenizer, open_tokenizer
from .dataset import Dataset, read_dataset, read_rows
from .encode import Example, Row

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
