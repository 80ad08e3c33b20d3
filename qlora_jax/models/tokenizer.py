"""Reads tokenizers: `tokenizer.json`, and the values of GGUF files."""

import pathlib
from typing import Any

from .gguf.tokenizer_in import gguf_tokenizer


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a checkpoint.

    Args:
        path: A folder with `tokenizer.json`, or a `.gguf` file whose tokenizer is
            SentencePiece's BPE, or a byte-level BPE with a known pre-tokenizer.

    Raises:
        ValueError: If a `.gguf` file's tokenizer is of another kind.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> tokenizer = load_tokenizer(save_tiny(tempfile.mkdtemp()))
        >>> len(tokenizer.encode("four").ids)
        4
    """
    import tokenizers

    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
