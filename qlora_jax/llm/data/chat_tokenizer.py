"""The tokenizer of a model, with its chat templates."""

import datetime
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ..models.tokenizer import chat_templates, open_folder_tokenizer, read_end_ids
from ..reading import ModelError, reading
from .readers import MAX_BYTES
from .rendering import Rendering, renderer

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]
Messages = Sequence[Message]
# The messages of a row by the names that error messages use for them, such as "prompt".
MessageGroups = Mapping[str, Messages]
Tools = Sequence[Any] | None  # descriptions of tools
_ROLES = ("system", "user", "assistant", "tool")


class Tokenizer:
    """The tokenizer and the chat template of a model, read on first use.

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
        """Stores the arguments. Files are read on first use.

        Args:
            path: The folder of a model.
            template: The text of a chat template that replaces the model's.
            now: The time for `strftime_now` in templates.
        """
        self.path, self._template, self._now = pathlib.Path(path), template, now

    @functools.cached_property
    def hf(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of transformers."""
        return open_folder_tokenizer(self.path)

    @property
    def inner(self) -> "tokenizers.Tokenizer":
        """The `tokenizers.Tokenizer`."""
        return self.hf.backend_tokenizer

    @functools.cached_property
    def chat(self) -> "Chat":
        """The chat templates."""
        templates = chat_templates(self.hf)
        if self._template is not None:
            templates = {"default": self._template}
        special = self.hf.special_tokens_map
        return Chat(str(self.path), templates, special, self._now)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.chat.templates)

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None if the model names none."""
        eos_id: Any = self.hf.eos_token_id
        return next(iter(self._config_end_ids), None) if eos_id is None else eos_id

    @functools.cached_property
    def _config_end_ids(self) -> tuple[int, ...]:
        with reading(f"the tokenizer of {self.path}", ModelError):
            return read_end_ids(self.path)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's, and the chat template's."""
        ids = [self.eos_id, *self._config_end_ids, self._find_turn_end()]
        return tuple(dict.fromkeys(x for x in ids if x is not None))

    def _find_turn_end(self) -> int | None:
        # The last special token that the template writes after an answer.
        _, written = self.chat.frame(None) if self.has_template else ("", "")
        added_tokens = self.inner.get_added_tokens_decoder()
        ids = self.encode(written, add_special_tokens=False)
        special = [i for i in ids if i in added_tokens and added_tokens[i].special]
        return special[-1] if special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add special tokens, such as the one for the
                beginning. Pass False for text from `render`, which has all of them.
        """
        return encode_with_offsets(self, text, add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens.

        Args:
            ids: The tokens.
            skip_special_tokens: Whether to omit special tokens.
        """
        ids = [int(i) for i in ids]
        text: Any = self.hf.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns messages as the chat template of the model writes them.

        Args:
            messages: The messages, each with a `role` and usually a `content`.
            tools: The descriptions of tools.
            add_generation_prompt: Whether to write the text that precedes an answer.

        Raises:
            ValueError: If there is no template, or if it rejects the messages.
        """
        return self.chat.render(messages, tools, add_generation_prompt).text


def open_tokenizer(
    path: str | pathlib.Path,
    *,
    template: str | pathlib.Path | None = None,
    now: datetime.datetime | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    transformers opens it, on first use, and renders chats. The tokenizer must be one of
    the library tokenizers, as in `tokenizer.json`.

    Args:
        path: A folder with tokenizer.json.
        template: A file with a chat template that replaces the model's.
        now: The date for templates that write one. Defaults to the current date.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> open_tokenizer(save_tiny(tempfile.mkdtemp())).has_template
        True
    """
    source = None
    if template is not None:
        if not pathlib.Path(template).is_file():
            raise ValueError(f"`template` must be a file. Got {str(template)!r}.")
        with reading(template):
            source = pathlib.Path(template).read_text("utf-8")
    return Tokenizer(path, template=source, now=now)


def encode_with_offsets(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool
) -> "tokenizers.Encoding":
    """Returns the tokens of a text, and the characters that each of them covers."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"the text must have at most {MAX_BYTES:,} characters.")
    text.encode()  # raises a ValueError for half a character, a surrogate
    # Some files only fail at a text.
    with reading(f"the tokenizer of {tokenizer.path}", ModelError):
        return tokenizer.inner.encode(text, add_special_tokens=add_special_tokens)


class AnswerSpans(NamedTuple):
    """A text and the positions of its answers."""

    text: str
    answers: list[tuple[int, int]]  # the start and the end of each, in characters
    is_rendered: bool  # whether a chat template wrote the text


@dataclass(eq=False)
class Chat:
    """The chat templates of a model, with the special tokens that they write."""

    owner: str  # the path of the model, for error messages
    templates: Mapping[str, str]  # by name
    special: Mapping[str, str]  # the special tokens by their variables in templates
    now: datetime.datetime | None
    _frames: dict[str, tuple[str, str]] = field(default_factory=dict)

    def template(self, tools: Tools) -> str:
        """Returns the template for messages with or without tools."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.templates:
                return self.templates[name]
        problem = "has none"
        if self.templates:
            problem = f"has templates {sorted(self.templates)}, but no default"
        raise ModelError(
            f"messages need a chat template: {self.owner} {problem}. Pass a file with "
            "a template, or rows of `prompt` and `completion`."
        )

    def check_roles(self, groups: MessageGroups, tools: Tools) -> None:
        """Rejects roles that are neither usual nor named in the template."""
        # If a template handles a role by its name, the name is one of its strings.
        template = self.template(tools)
        if unknown := [
            f"{message['role']!r} in `{name}[{index}]`"
            for name, messages in groups.items()
            for index, message in enumerate(messages)
            if message["role"] not in _ROLES
            and not any(f"{x}{message['role']}{x}" in template for x in "'\"")
        ]:
            raise ValueError(
                f"roles must be {', '.join(_ROLES)}, or others that the chat template "
                f"names. Got {', '.join(unknown)}. In the file, write user instead of "
                "human, and assistant instead of bot or gpt."
            )

    def render(
        self, messages: Messages, tools: Tools, add_generation_prompt: bool = False
    ) -> Rendering:
        """Renders messages. The result has the answers that the template marks."""
        # Data sets fill missing fields with None, which templates would write.
        fields = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        arguments = {
            "conversations": [fields],
            "tools": tools,
            "chat_template": self.template(tools),
            "return_assistant_tokens_mask": True,
            "add_generation_prompt": add_generation_prompt,
            **self.special,
        }
        return renderer.render(arguments, self.now)

    def frame(self, tools: Tools) -> tuple[str, str]:
        """Returns what the template writes before an answer "a", and from it on.

        Both are empty if a rendering without the answer is no beginning of one with it.
        """
        template = self.template(tools)
        if template not in self._frames:
            question, answer = ({"role": r, "content": "a"} for r in _ROLES[1:3])
            self._frames[template] = "", ""
            try:
                asked = self.render([question], tools).text
                prompt = self.render([question], tools, True).text
                answered = self.render([question, answer], tools).text
            except ModelError:
                raise
            except ValueError:  # the template rejects these messages
                return self._frames[template]
            if answered.startswith(prompt):
                before, written = prompt.removeprefix(asked), answered[len(prompt) :]
                self._frames[template] = before, written
        return self._frames[template]

    def find_answers(
        self, rendering: Rendering, messages: Messages, turns: list[int], tools: Tools
    ) -> AnswerSpans:
        """Finds the answers in the messages whose indices are `turns`."""
        if not turns:
            raise ValueError(
                "the row must have a message of the assistant to train on."
            )
        text, marked = rendering
        assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if marked and turns == assistant:
            return AnswerSpans(text, marked, True)
        spans = self._find_framed(text, messages, assistant, tools)
        if spans is None:
            spans = {x: self._find_by_prefix(text, messages, x, tools) for x in turns}
        answers = [spans[turn] for turn in turns]
        if marked:
            answers = [
                x for x in marked if any(x[0] < y[1] and y[0] < x[1] for y in answers)
            ]
            if not answers:
                raise ValueError("the chat template must mark an answer in the row.")
        return AnswerSpans(text, answers, True)

    def _find_framed(
        self, text: str, messages: Messages, assistant: list[int], tools: Tools
    ) -> dict[int, tuple[int, int]] | None:
        # Most templates write the same text before each answer, and nowhere else, and
        # the same text after each. If the number of these texts is that of the answers,
        # and each is followed by its answer, no other rendering is needed.
        before, written = self.frame(tools)
        if not before or not written.startswith("a"):
            return None
        starts = [match.end() for match in re.finditer(re.escape(before), text)]
        if len(starts) != len(assistant):
            return None
        spans = {}
        for turn, start in zip(assistant, starts, strict=True):
            answer = f"{messages[turn].get('content')}{written[1:]}"
            if not text.startswith(answer, start):
                return None
            spans[turn] = start, start + len(answer)
        return spans

    def _find_by_prefix(
        self, text: str, messages: Messages, turn: int, tools: Tools
    ) -> tuple[int, int]:
        # An answer is the difference between renderings with and without it.
        def find_end(count, add_generation_prompt):
            beginning = self.render(messages[:count], tools, add_generation_prompt).text
            if not text.startswith(beginning):
                raise ValueError(
                    f"the answer in message {turn} cannot be found: the chat template "
                    "renders it, or the text before it, differently when messages "
                    "follow. Mark answers by `{% generation %}` in the template, or "
                    'train on "last" or "all".'
                )
            return len(beginning)

        is_last = turn + 1 == len(messages)
        return find_end(turn, True), len(text) if is_last else find_end(turn + 1, False)
