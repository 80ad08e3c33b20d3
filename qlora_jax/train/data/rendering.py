"""Renders a chat template as transformers does, in Jinja's sandbox."""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import exceptions, ext, nodes, sandbox

from .model_files import ModelError

_START, _END = "\ufdd0", "\ufdd1"  # around an answer: no characters of texts


class Rendering(NamedTuple):
    """A rendered text."""

    text: str
    answers: list[tuple[int, int]]  # start and end of each `{% generation %}`


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, now: datetime.datetime | None = None):
        self.source = source
        # Whether it has `{% generation %}`.
        self.marks_answers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda fmt: (now or datetime.datetime.now()).strftime(fmt),
        }
        self._template = _guarded(lambda: environment.from_string(source))
        # Roles that a template handles by their names are among its literals.
        literals = environment.parse(source).find_all(nodes.Const)
        self.literals = {literal.value for literal in literals}

    def render(self, values: Mapping[str, Any]) -> Rendering:
        """Renders the template with values by name."""
        text = _guarded(lambda: self._template.render(**values))
        return _unmarked(text) if self.marks_answers else Rendering(text, [])


def _guarded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except exceptions.SecurityError as error:
        raise ModelError(
            f"the chat template must not reach outside its sandbox. {error}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template must be Jinja. Line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # a template may raise whatever Python does
        text = str(error) or type(error).__name__
        raise ValueError(f"the chat template refuses it: {text:.500}") from error


def _unmarked(marked: str) -> Rendering:
    parts, answers, length = [], [], 0
    for index, piece in enumerate(marked.split(_START)):
        inside, mark, rest = piece.partition(_END)
        if bool(mark) != (index > 0) or _END in rest:
            raise ValueError(
                "texts must not hold the noncharacters U+FDD0 and U+FDD1, nor a chat "
                "template an answer in an answer."
            )
        if inside and mark:
            answers.append((length, length + len(inside)))
        parts += [inside, rest]
        length += len(inside) + len(rest)
    return Rendering("".join(parts), answers)


class _Generation(ext.Extension):
    """`{% generation %}`: marks the text that the model is to write."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}"


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
