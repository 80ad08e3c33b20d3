"""Reads tokenizers of folders and GGUF files, and the chat templates of folders."""

import pathlib
from typing import Any

from .folder_tokenizer import FolderTokenizer, read_text
from .gguf.tokenizer_in import gguf_tokenizer


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a checkpoint.

    Args:
        path: A folder with `tokenizer.json`, or a `.gguf` file whose tokenizer is
            SentencePiece's BPE, or a byte-level BPE with a known pre-tokenizer.

    Raises:
        ValueError: If a `.gguf` file's tokenizer is of another kind, or if a folder's
            settings would change tokens in a way that is not supported.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> tokenizer = load_tokenizer(save_tiny(tempfile.mkdtemp()))
        >>> len(tokenizer.encode("four").ids)
        4
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    return FolderTokenizer(path).build()


def folder_templates(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns templates by name; the usual one is "default".

    `settings` are those of its `tokenizer_config.json`.
    """
    if (file := folder / "chat_template.jinja").exists():
        found = {"default": read_text(file)}
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[file.stem] = read_text(file)
        return found
    template = settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    found = {}
    for item in template if isinstance(template, list) else [None]:
        named = isinstance(item, dict) and (item.get("name"), item.get("template"))
        if not named or not all(isinstance(x, str) for x in named):
            raise ValueError(
                "`chat_template` in tokenizer_config.json must be text, or a list of "
                f"named ones. Got {template!r:.60}."
            )
        found[named[0]] = named[1]
    return found
