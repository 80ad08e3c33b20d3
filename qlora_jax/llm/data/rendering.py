"""Renders a chat template as transformers does, in Jinja's sandbox."""

import datetime
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import jinja2
from jinja2 import exceptions, ext, nodes
from jinja2.parser import Parser

from .bounded_jinja import MAX_SOURCE, BoundedEnvironment, LimitError
from .model_files import ModelError

T = TypeVar("T")
# These mark answers in a rendered text. They are noncharacters, which no text contains.
_START, _END = "\ufdd0", "\ufdd1"


class Rendering(NamedTuple):
    """A rendered text, and the start and end of each `{% generation %}` in it."""

    text: str
    answers: list[tuple[int, int]]


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, now: datetime.datetime | None = None):
        self.source = source
        # These settings are those of transformers. Templates rely on them.
        self._environment = environment = BoundedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
        )
        # Jinja's own `tojson` escapes HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda fmt: (now or datetime.datetime.now()).strftime(fmt),
        }
        if len(source) > MAX_SOURCE:
            raise ModelError(
                f"the chat template must have at most {MAX_SOURCE:,} characters. Got "
                f"{len(source):,}."
            )
        self._template = _call_guarded(self._compile)

    def _compile(self) -> jinja2.Template:
        tree = self._environment.parse(self.source)
        # Whether the template has `{% generation %}`, whose extension is the only one
        # that adds such a node.
        self.marks_answers = tree.find(nodes.ExtensionAttribute) is not None
        # If a template handles a role by its name, the name is one of its literals.
        self.literals = {literal.value for literal in tree.find_all(nodes.Const)}
        return self._environment.compile_tree(tree)

    def render(self, variables: Mapping[str, Any]) -> Rendering:
        """Renders the template with the variables."""
        self._environment.start()
        text = _call_guarded(lambda: self._template.render(**variables))
        return _find_marks(text) if self.marks_answers else Rendering(text, [])


def _call_guarded(function: Callable[[], T]) -> T:
    # A broken template is a fault of the model. All other errors are faults of a row.
    try:
        return function()
    except LimitError as error:
        raise ModelError(f"the chat template {error}") from error
    except exceptions.SecurityError as error:
        raise ModelError(
            f"the chat template must not reach outside its sandbox. {error}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template must be Jinja. Line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # expressions in templates raise any error of Python
        text = str(error) or type(error).__name__
        raise ValueError(
            f"the chat template rejects the messages: {text:.500}"
        ) from error


def _find_marks(marked_text: str) -> Rendering:
    # Removes the marks from a text, and finds the answers in the text without marks.
    parts, answers, length = [], [], 0
    for index, piece in enumerate(marked_text.split(_START)):
        # The first piece is before all answers. Each later one is an answer, an end
        # mark, and the text up to the next answer.
        answer, mark, text = piece.partition(_END)
        if bool(mark) != (index > 0) or _END in text:
            raise ValueError(
                "texts must not contain the noncharacters U+FDD0 and U+FDD1, and a "
                "chat template must not nest `{% generation %}` blocks."
            )
        if answer and mark:
            answers.append((length, length + len(answer)))
        parts += [answer, text]
        length += len(answer) + len(text)
    return Rendering("".join(parts), answers)


class _Generation(ext.Extension):
    """`{% generation %}`, which marks text that the model should write."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}"


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))
