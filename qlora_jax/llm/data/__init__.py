"""Rows of data: chat templates, tokens, targets and batches."""

from typing import TYPE_CHECKING

from ..lazy import make_getattr

if TYPE_CHECKING:
    from .batching import Batch, batches, eval_batches
    from .chat_tokenizer import Tokenizer, open_tokenizer
    from .dataset import Dataset, read_dataset
    from .encode import Row

__all__ = [
    "Batch",
    "Dataset",
    "Row",
    "Tokenizer",
    "batches",
    "eval_batches",
    "open_tokenizer",
    "read_dataset",
]

# `..app.configs` needs only a type of this package, and not what its modules import.
__getattr__ = make_getattr(
    __name__, __all__, ["batching", "chat_tokenizer", "dataset", "encode"]
)
