"""A model's tokenizer with its chat template."""

import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...models.folder_tokenizer import read_text
from ...models.tokenizer import load_tokenizer
from .model_files import ModelError, ModelFiles, read_model_files
from .templates import Chat


class Tokenizer:
    """A model's tokenizer and chat template; reads its files on first use.

    Example:
        >>> import json, tempfile, tokenizers
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> words = tokenizers.models.WordLevel({"hi": 0, "</s>": 1}, "hi")
        >>> tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
        >>> template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
        >>> settings = {"eos_token": "</s>", "chat_template": template}
        >>> _ = (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        >>> tokenizer = open_tokenizer(folder)
        >>> tokenizer.render([{"role": "user", "content": "hi"}]), tokenizer.end_ids
        ('hi</s>', (1,))
        >>> tokenizer.decode(tokenizer.encode("hi"))
        'hi'
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        template: str | None = None,
        now: datetime.datetime | None = None,
    ):
        """Reads nothing yet.

        Args:
            path: A model's folder or `.gguf` file.
            template: The text of a chat template, in place of the model's.
            now: The time for a template's `strftime_now`.
        """
        self._path, self._template, self._now = pathlib.Path(path), template, now

    @functools.cached_property
    def inner(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        try:
            tokenizer = load_tokenizer(self._path)
        except Exception as error:  # `tokenizers` raises no other kind
            raise ModelError(
                f"{self._path} must have a tokenizer that can be read. {error}"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _files(self) -> ModelFiles:
        return read_model_files(self._path)

    @functools.cached_property
    def chat(self) -> Chat:
        """The chat templates."""
        sources = self._files.templates
        if self._template is not None:
            sources = {"default": self._template}
        return Chat(str(self._path), sources, self._files.special, self._now)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.chat.sources)

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text; None if the model names none."""
        token = self._files.special.get("eos_token")
        found = self.inner.token_to_id(token) if token else None
        return found if found is not None else next(iter(self._files.end_ids), None)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's, and that of the chat template."""
        found = [self.eos_id, *self._files.end_ids, self._turn_end()]
        return tuple(dict.fromkeys(x for x in found if x is not None))

    def _turn_end(self) -> int | None:
        if not self.has_template:
            return None
        ask, answer = ({"role": r, "content": "a"} for r in ("user", "assistant"))
        try:
            before = self.render([ask], add_generation_prompt=True)
            full = self.render([ask, answer])
        except ModelError:
            raise
        except ValueError:  # it wants other messages
            return None
        if not full.startswith(before):
            return None
        added = self.inner.get_added_tokens_decoder()
        ids = self.encode(full[len(before) :], add_special_tokens=False)
        special = [i for i in ids if i in added and added[i].special]
        return special[-1] if special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add tokens such as that for the beginning.
                Not for text from `render`: the template has written all of them.

        Raises:
            ValueError: If the text has a lone surrogate, which is no character.
        """
        return encode_text(self.inner, text, add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens.

        Args:
            ids: The tokens.
            skip_special_tokens: Whether to leave out special tokens.
        """
        ids = [int(i) for i in ids]
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns messages as the model's chat template writes them.

        Args:
            messages: The messages, each with a `role` and mostly a `content`.
            tools: Descriptions of tools.
            add_generation_prompt: Whether to write what comes before an answer.

        Raises:
            ValueError: If there is no template, or it refuses the messages.
        """
        messages = self.chat.readable(messages, tools)
        return self.chat.render(messages, tools, add_generation_prompt).text


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool) -> Any:
    """Returns the `tokenizers.Encoding` of a text; refuses a lone surrogate."""
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TypeError as error:
        raise ValueError(
            f"it must not have half a character (a surrogate). Got {text!r:.200}."
        ) from error


def open_tokenizer(
    path: str | pathlib.Path,
    *,
    template: str | pathlib.Path | None = None,
    now: datetime.datetime | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    A folder's tokens are those of transformers 5.24, and a `.gguf` file's those of
    llama.cpp. Settings of a folder that would give other tokens raise a ValueError when
    the tokenizer is first used.

    Args:
        path: A folder with tokenizer.json, or a `.gguf` file.
        template: A file with a chat template, in place of the model's.
        now: The date for templates that write one; by default that of the rendering.

    Raises:
        ValueError: If `template` cannot be read.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "template.jinja"
        >>> _ = path.write_text("{{ messages[0].content }}")
        >>> open_tokenizer("folder", template=path).has_template
        True
    """
    source = None if template is None else read_text(pathlib.Path(template))
    return Tokenizer(path, template=source, now=now)
