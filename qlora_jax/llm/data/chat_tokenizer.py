"""The tokenizer of a model, with its chat templates."""

import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..models.folder import ChatSettings, ModelFolder
from ..models.tokenizer import read_text
from ..reading import reading
from .model_files import ModelError, read_model_files
from .omissions import without_space
from .readers import MAX_BYTES

if TYPE_CHECKING:
    import tokenizers

    from .rendering import Rendering, Template

Message = Mapping[str, Any]
Messages = Sequence[Message]
# The messages of a row by the names that error messages use for them, such as "prompt".
MessageGroups = Mapping[str, Messages]
Tools = Sequence[Any] | None  # descriptions of tools
_ROLES = ("system", "user", "assistant", "tool")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "a key that no template reads"


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
    def inner(self) -> "tokenizers.Tokenizer":
        """The `tokenizers.Tokenizer`."""
        with reading(f"the tokenizer of {self.path}", ModelError):
            tokenizer = ModelFolder(self.path).build_tokenizer()
        # Some files enable these, which would change rows without a warning.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _settings(self) -> ChatSettings:
        return read_model_files(self.path)

    @functools.cached_property
    def chat(self) -> "Chat":
        """The chat templates."""
        sources = self._settings.templates
        if self._template is not None:
            sources = {"default": self._template}
        return Chat(str(self.path), sources, self._settings.special, self._now)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self.chat.sources)

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None if the model names none."""
        token = self._settings.special.get("eos_token")
        token_id = self.inner.token_to_id(token) if token else None
        end_ids = self._settings.end_ids
        return next(iter(end_ids), None) if token_id is None else token_id

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's, and the chat template's."""
        ids = [self.eos_id, *self._settings.end_ids, self._find_turn_end()]
        return tuple(dict.fromkeys(x for x in ids if x is not None))

    def _find_turn_end(self) -> int | None:
        # The last special token that the template writes after an answer.
        if not self.has_template:
            return None
        question, answer = ({"role": r, "content": "a"} for r in ("user", "assistant"))
        try:
            prompt = self.render([question], add_generation_prompt=True)
            text = self.render([question, answer])
        except ModelError:
            raise
        except ValueError:  # the template rejects these two messages
            return None
        if not text.startswith(prompt):
            return None
        added_tokens = self.inner.get_added_tokens_decoder()
        ids = self.encode(text[len(prompt) :], add_special_tokens=False)
        special = [i for i in ids if i in added_tokens and added_tokens[i].special]
        return special[-1] if special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Whether to add special tokens, such as the one for the
                beginning. Pass False for text from `render`, which has all of them.

        Raises:
            ValueError: If the text has a lone surrogate, which is not a character.
        """
        return encode_with_offsets(self, text, add_special_tokens)[0].ids

    @functools.cached_property
    def longest_token(self) -> int:
        """The number of characters of the longest token in the vocabulary."""
        # The limit is for hostile files. Longer tokens are not known.
        return min(max(map(len, self.inner.get_vocab()), default=1), 1000)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of tokens.

        Args:
            ids: The tokens.
            skip_special_tokens: Whether to omit special tokens.
        """
        ids = [int(i) for i in ids]
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)

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
        messages = self.chat.adapt_contents(messages, tools)
        return self.chat.render(messages, tools, add_generation_prompt).text


def open_tokenizer(
    path: str | pathlib.Path,
    *,
    template: str | pathlib.Path | None = None,
    now: datetime.datetime | None = None,
) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    Tokens are the same as in transformers 5.24. The first use raises a ValueError if
    the model has settings that change tokens and are not supported.

    Args:
        path: A folder with tokenizer.json.
        template: A file with a chat template that replaces the model's.
        now: The date for templates that write one. Defaults to the current date.

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


def encode_with_offsets(
    tokenizer: Tokenizer,
    text: str,
    add_special_tokens: bool,
    max_length: int | None = None,
) -> "tuple[tokenizers.Encoding, bool]":
    """Returns the tokens of a text, and whether they are only those of its beginning.

    Tokenizing takes hundreds of bytes per token. So a text that is longer than
    `max_length` tokens can be is cut before. Its tokens are more than `max_length`.
    """
    if max_length is not None and len(text) > max_length:
        # Twice the length, so that KTO can replace the prompt of an answer by a shorter
        # one. One token more, because the tokens at the cut may differ.
        num_tokens = 2 * max_length + tokenizer.longest_token
        beginning = text[: num_tokens * tokenizer.longest_token]
        if len(beginning) < len(text):
            encoding, _ = encode_with_offsets(tokenizer, beginning, add_special_tokens)
            # The tokens are fewer if the tokenizer removes characters, or if any number
            # of unknown ones become one token. Then only the whole text can tell.
            if len(encoding.ids) >= num_tokens:
                encoding.truncate(num_tokens)
                return encoding, True
    if len(text) > MAX_BYTES:
        raise ValueError(f"the text must have at most {MAX_BYTES:,} characters.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text must not have half a character (a surrogate). Got {text!r:.200}."
        ) from error
    # Some files only fail at a text.
    with reading(f"the tokenizer of {tokenizer.path}", ModelError):
        tokens = tokenizer.inner.encode(text, add_special_tokens=add_special_tokens)
        return tokens, False


class AnswerSpans(NamedTuple):
    """A text and the positions of its answers."""

    text: str
    answers: list[tuple[int, int]]  # the start and the end of each, in characters
    is_rendered: bool  # whether a chat template wrote the text


@dataclass(eq=False)
class Chat:
    """The chat templates of a model, with the special tokens that they write."""

    owner: str  # the path of the model, for error messages
    sources: Mapping[str, str]  # the templates by name
    special: Mapping[str, str]  # the special tokens by their variables in templates
    now: datetime.datetime | None

    @functools.cached_property
    def _templates(self) -> "dict[str, Template]":
        # Rows of text or tokens need no Jinja, which may be missing.
        try:
            from .rendering import Template
        except ImportError as error:
            raise ImportError(
                "chat templates need: pip install 'qlora-jax[train]'"
            ) from error
        return {name: Template(text, self.now) for name, text in self.sources.items()}

    def template(self, tools: Tools) -> "Template":
        """Returns the template for messages with or without tools."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.sources:
                return self._templates[name]
        problem = "has none"
        if self.sources:
            problem = f"has templates {sorted(self.sources)}, but no default"
        raise ModelError(
            f"messages need a chat template: {self.owner} {problem}. Pass a file with "
            "a template, or rows of `prompt` and `completion`."
        )

    def check_roles(self, groups: MessageGroups, tools: Tools) -> None:
        """Rejects roles that are neither usual nor named in the template."""
        allowed = {*_ROLES, *self.template(tools).literals}
        if unknown := [
            f"{message['role']!r} in `{name}[{index}]`"
            for name, messages in groups.items()
            for index, message in enumerate(messages)
            if message["role"] not in allowed
        ]:
            raise ValueError(
                f"roles must be {', '.join(_ROLES)}, or others that the chat template "
                f"names. Got {', '.join(unknown)}. In the file, write user instead of "
                "human, and assistant instead of bot or gpt."
            )

    def adapt_contents(self, messages: Messages, tools: Tools) -> Messages:
        """Joins contents that are lists of texts if the template expects strings."""
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        if self._supports_parts(messages, tools):
            return messages
        # A template that expects strings would write a list as Python or JSON code.
        adapted = []
        for message in messages:
            if isinstance(parts := message.get("content"), list):
                if wrong := [part for part in parts if not _is_text(part)]:
                    raise ValueError(
                        "the chat template reads contents as strings, so all parts "
                        'must be {"type": "text", "text": ...}. Got '
                        f"{wrong[0]!r:.60}."
                    )
                message = {**message, "content": "".join(x["text"] for x in parts)}
            adapted.append(message)
        return adapted

    def _supports_parts(self, messages: Messages, tools: Tools) -> bool:
        # Add a key to each part. A template that reads parts ignores this key. One that
        # expects a string writes the whole list, including this key.
        probed, texts = [], []
        for message in messages:
            if isinstance(parts := message.get("content"), list):
                if not all(isinstance(part, dict) for part in parts):
                    return False
                texts += [str(part["text"]) for part in parts if part.get("text")]
                message = {**message, "content": [x | {_PROBE: _PROBE} for x in parts]}
            probed.append(message)
        try:
            rendered = without_space(self.render(probed, tools).text)
        except ModelError:
            raise
        except ValueError:
            return False
        has_texts = all(without_space(text) in rendered for text in texts)
        return has_texts and without_space(_PROBE) not in rendered

    def render(
        self, messages: Messages, tools: Tools, add_generation_prompt: bool = False
    ) -> "Rendering":
        """Renders messages. The result has the answers that the template marks."""
        # Define the same variables as transformers, even those that are None, since
        # templates test whether a variable is defined.
        variables = {
            **self.special,
            "messages": [_normalize(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self.template(tools).render(variables)

    def find_answers(
        self, rendering: "Rendering", messages: Messages, turns: list[int], tools: Tools
    ) -> AnswerSpans:
        """Finds the answers in the messages whose indices are `turns`."""
        if not turns:
            raise ValueError(
                "the row must have a message of the assistant to train on."
            )
        text, answers = rendering

        def find_end(count, turn, add_generation_prompt):
            # Returns where the text of the first `count` messages ends. `turn` is the
            # message with the answer, for the error.
            beginning = self.render(messages[:count], tools, add_generation_prompt).text
            if not text.startswith(beginning):
                raise ValueError(
                    f"the answer in message {turn} cannot be found: the chat template "
                    "renders it, or the text before it, differently when messages "
                    "follow. Mark answers by `{% generation %}` in the template, or "
                    'train on "last" or "all".'
                )
            return len(beginning)

        def find_span(turn):
            # An answer is the difference between renderings with and without it. It
            # starts where the `turn` messages before it and the generation prompt end.
            start = find_end(turn, turn, True)
            is_last = turn + 1 == len(messages)
            return start, len(text) if is_last else find_end(turn + 1, turn, False)

        if not self.template(tools).marks_answers:
            return AnswerSpans(text, [find_span(turn) for turn in turns], True)
        assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        # The template has marked the answers of all assistant messages. Remove those of
        # messages that are not in `turns`. One rendering shows where the first turn
        # starts, which removes all earlier answers. Later ones are located one by one.
        if assistant[0] < turns[0]:
            start = find_end(turns[0], turns[0], True)
            answers = [span for span in answers if span[1] > start]
        for turn in assistant:
            if turn > turns[0] and turn not in turns:
                start, end = find_span(turn)
                answers = [x for x in answers if x[1] <= start or x[0] >= end]
        if not answers:
            raise ValueError("the chat template must mark an answer in the row.")
        return AnswerSpans(text, answers, True)


def _is_text(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    keys = {key for key, x in part.items() if x is not None}
    return keys == {"type", "text"} and isinstance(part["text"], str)


def _normalize(message: Message) -> dict[str, Any]:
    # Data sets fill missing fields with None, which templates would write, so drop
    # those. Store the reasoning under two names, since templates differ in which they
    # read.
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING_KEYS if key in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields
