"""The chat templates of a model."""

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .model_files import ModelError

if TYPE_CHECKING:
    from .rendering import Rendering, Template

_MARK = "a key that no template reads"
_ROLES = ("system", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Marked(NamedTuple):
    """A text and its answers."""

    text: str
    answers: list[tuple[int, int]]  # start and end of each
    rendered: bool  # by a chat template


@dataclass(eq=False)
class Chat:
    """Chat templates, with the special tokens that they write."""

    owner: str
    sources: Mapping[str, str]
    special: Mapping[str, Any]
    now: datetime.datetime | None

    @functools.cached_property
    def _templates(self) -> "dict[str, Template]":
        try:
            from .rendering import Template
        except ImportError as error:
            raise ImportError(
                "chat templates need: pip install 'qlora-jax[train]'"
            ) from error
        return {name: Template(text, self.now) for name, text in self.sources.items()}

    def template(self, tools: Sequence[Any] | None) -> "Template":
        """Returns the template for messages with such tools."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self.sources:
                return self._templates[name]
        has = "has none"
        if self.sources:
            has = f"has templates {sorted(self.sources)}, but no default"
        raise ModelError(
            f"messages need a chat template: {self.owner} {has}. Give a file with one, "
            "or rows of `prompt` and `completion`."
        )

    def check_roles(
        self,
        row: Mapping[str, Sequence[Mapping[str, Any]]],
        tools: Sequence[Any] | None,
    ) -> None:
        """Refuses roles that the template would write, but does not name.

        `row` has the messages by the names that errors give them.
        """
        known = {*_ROLES, *self.template(tools).literals}
        if unknown := [
            f"{message['role']!r} in `{name}[{index}]`"
            for name, messages in row.items()
            for index, message in enumerate(messages)
            if message["role"] not in known
        ]:
            raise ValueError(
                f"roles must be {', '.join(_ROLES)}, or others that the chat template "
                f"names. Got {', '.join(unknown)}."
            )

    def readable(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> Sequence[Mapping[str, Any]]:
        """Returns messages whose contents are of the kind that the template reads."""
        is_list = lambda message: isinstance(message.get("content"), list)
        lists = [message["content"] for message in messages if is_list(message)]
        if not lists or self._reads(messages, tools):
            return messages
        # The template would write a list of parts as Python or JSON does: join them.
        if others := [part for parts in lists for part in parts if not _is_text(part)]:
            raise ValueError(
                "the chat template reads contents that are text: their parts must be "
                f'{{"type": "text", "text": ...}}. Got {others[0]!r:.60}.'
            )
        texts = iter("".join(part["text"] for part in parts) for parts in lists)
        return [{**m, "content": next(texts)} if is_list(m) else m for m in messages]

    def _reads(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
    ) -> bool:
        """Whether the template writes the texts of parts, and not all of the parts."""
        marked, texts = [], []
        for message in messages:
            if isinstance(parts := message.get("content"), list):
                if not all(isinstance(part, dict) for part in parts):
                    return False
                texts += [str(part["text"]) for part in parts if part.get("text")]
                message = {**message, "content": [x | {_MARK: _MARK} for x in parts]}
            marked.append(message)
        try:
            text = self.render(marked, tools).text
        except ModelError:
            raise
        except ValueError:
            return False
        text = "".join(text.split())
        squeezed = ["".join(x.split()) for x in (*texts, _MARK)]
        return all(x in text for x in squeezed[:-1]) and squeezed[-1] not in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> "Rendering":
        """Renders messages; the result has the answers that the template marks."""
        return self.template(tools).render(
            {
                **self.special,
                "messages": [_plain(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
        )

    def mark(
        self,
        rendering: "Rendering",
        messages: Sequence[Mapping[str, Any]],
        turns: Sequence[int],
        tools: Any,
    ) -> Marked:
        """Finds the answers of some messages of the assistant in a rendering."""
        if not turns:
            raise ValueError("it must have a message of the assistant to train on.")
        text, answers = rendering

        def length(count: int, turn: int, is_prompt: bool) -> int:
            """Returns where the first messages end in the text."""
            beginning = self.render(messages[:count], tools, is_prompt).text
            if not text.startswith(beginning):
                raise ValueError(
                    f"the answer in message {turn} cannot be found: the chat template "
                    "writes what comes before it, or the answer, otherwise when more "
                    "messages follow. Mark answers by `{% generation %}` in the "
                    'template, or train on "last" or "all".'
                )
            return len(beginning)

        def answer(turn: int) -> tuple[int, int]:
            """Returns the start and the end of the text that a message adds.

            Both renderings must be how the full text begins.
            """
            is_last = turn + 1 == len(messages)
            stop = len(text) if is_last else length(turn + 1, turn, False)
            return length(turn, turn, True), stop

        if not self.template(tools).marks_answers:
            return Marked(text, [answer(turn) for turn in turns], True)
        assistant = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if assistant[0] < turns[0]:
            begin = length(turns[0], turns[0], True)
            answers = [span for span in answers if span[1] > begin]
        for turn in {*assistant[assistant.index(turns[0]) :]} - {*turns}:
            start, stop = answer(turn)
            answers = [x for x in answers if x[1] <= start or x[0] >= stop]
        if not answers:
            raise ValueError("the chat template must mark an answer in it.")
        return Marked(text, answers, True)


def _is_text(part: Any) -> bool:
    """Whether a part has a text and no more."""
    has = isinstance(part, dict) and {key for key, x in part.items() if x is not None}
    return has == {"type", "text"} and isinstance(part["text"], str)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Drops None, and names reasoning as templates do."""
    found = {key: value for key, value in message.items() if value is not None}
    reasoning = next((found[key] for key in _REASONING if key in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found
