"""Which characters of a conversation the assistant wrote."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .templates import Tokenizer, unmarked


class Spoken(NamedTuple):
    """A text and its answers.

    Attributes:
        text: The text.
        answers: The first character of each, and the one behind its last.
        rendered: Whether a chat template wrote the text.
    """

    text: str
    answers: list[tuple[int, int]]
    rendered: bool

    @staticmethod
    def of_text(prompt: str, completion: str) -> "Spoken":
        """Joins a prompt and a completion."""
        text = prompt + completion
        return Spoken(text, [(len(prompt), len(text))], False)


def find_answers(
    tokenizer: Tokenizer,
    prompt: Sequence[dict[str, Any]],
    completion: Sequence[dict[str, Any]],
    tools: Any,
) -> Spoken:
    """Renders a conversation and finds the assistant's turns in the completion.

    They are what the template marks by `{% generation %}`. Where it marks nothing, an
    answer is what the rendering of the messages up to it has more than the rendering
    of those before it, and both must be how the whole begins.

    Raises:
        ValueError: If there is no answer, or the template does not show where it is.
    """
    messages = [*prompt, *completion]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [i for i in turns if i >= len(prompt)]
    if not turns:
        raise ValueError("it must have a message of the assistant.")
    if tokenizer.template_for(tools).marks_answers:
        marked = tokenizer.render_marked(messages, tools)
        text, answers = unmarked(marked)
        if prompt:
            before = _start(tokenizer, text, messages, len(prompt), tools)
            answers = [(a, b) for a, b in answers if a >= before]
        if not answers:
            raise ValueError("the chat template must mark an answer in it.")
        return Spoken(text, answers, True)
    text = tokenizer.render(messages, tools)
    answers = []
    for turn in turns:
        start = _start(tokenizer, text, messages, turn, tools)
        whole = text
        if turn + 1 < len(messages):
            whole = tokenizer.render(messages[: turn + 1], tools)
            _check_prefix(text, whole, turn)
        answers.append((start, len(whole)))
    return Spoken(text, answers, True)


def _start(
    tokenizer: Tokenizer, text: str, messages: Any, turn: int, tools: Any
) -> int:
    before = tokenizer.render(messages[:turn], tools, add_generation_prompt=True)
    _check_prefix(text, before, turn)
    return len(before)


def _check_prefix(text: str, beginning: str, turn: int) -> None:
    if not text.startswith(beginning):
        raise ValueError(
            f"the chat template must write the messages up to {turn} alike whatever "
            "follows, so that the answer can be found. Mark it by `{% generation %}` "
            'in the template, or train on "all".'
        )
