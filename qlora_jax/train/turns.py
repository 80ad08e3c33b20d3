"""Texts to train on, and which characters of them are answers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .templates import Tokenizer

if TYPE_CHECKING:
    from .sandbox import Rendering


class Spoken(NamedTuple):
    """A text and its answers.

    Attributes:
        text: The text.
        answers: The first character and the end of each.
        rendered: Whether a chat template wrote the text.
    """

    text: str
    answers: list[tuple[int, int]]
    rendered: bool


def joined(prompt: str, completion: str) -> Spoken:
    """Returns a prompt followed by its completion."""
    text = prompt + completion
    return Spoken(text, [(len(prompt), len(text))], False)


def find_answers(
    tokenizer: Tokenizer,
    rendering: "Rendering",
    messages: Sequence[Mapping[str, Any]],
    first: int,
    tools: Any,
) -> Spoken:
    """Finds the assistant's turns in a conversation.

    They are what the template marks by `{% generation %}`. Where it marks nothing, an
    answer is what the messages up to it, rendered, have more than those before it; both
    must be how the whole begins.

    Args:
        tokenizer: Renders.
        rendering: The conversation.
        messages: Its messages.
        first: The first of them in which answers count.
        tools: Descriptions of tools.

    Raises:
        ValueError: If there is no answer, or it cannot be found.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [i for i in turns if i >= first]
    if not turns:
        raise ValueError("it must have a message of the assistant to train on.")
    text, answers = rendering
    if tokenizer.chat.template(tools).marks_answers:
        if first:
            begin = _start(tokenizer, text, messages, first, tools)
            answers = [(start, end) for start, end in answers if end > begin]
        if not answers:
            raise ValueError("the chat template must mark an answer in it.")
        return Spoken(text, answers, True)
    answers = []
    for turn in turns:
        start = _start(tokenizer, text, messages, turn, tools)
        whole = text
        if turn + 1 < len(messages):
            whole = tokenizer.chat.render(messages[: turn + 1], tools).text
            _check_beginning(text, whole, turn)
        answers.append((start, len(whole)))
    return Spoken(text, answers, True)


def _start(
    tokenizer: Tokenizer, text: str, messages: Sequence[Any], turn: int, tools: Any
) -> int:
    before = tokenizer.chat.render(messages[:turn], tools, True).text
    _check_beginning(text, before, turn)
    return len(before)


def _check_beginning(text: str, beginning: str, turn: int) -> None:
    if not text.startswith(beginning):
        raise ValueError(
            f"the answer in message {turn} cannot be found: the chat template writes "
            "what comes before it, or the answer, otherwise when more messages follow. "
            'Mark answers by `{% generation %}` in the template, or train on "all".'
        )
