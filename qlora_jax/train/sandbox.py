"""Chat templates: Jinja in a sandbox whose time and memory are bounded.

A template comes with a model, so it may be hostile. Jinja's sandbox keeps it from
Python's internals. Here each loop and call also spends a budget, and no value grows
past a limit. Templates have the names that transformers gives them.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import compiler, exceptions, ext, nodes, sandbox, utils

from .bounds import bounded_filter, check_call, check_length, check_operation
from .model_files import ModelError

MAX_SOURCE = 1 << 20  # characters
BUDGET = 200_000  # loops' rounds and calls in one rendering
_START, _END = "\ufdd0", "\ufdd1"  # around what is marked: no characters of texts


class Rendering(NamedTuple):
    """What a template made.

    Attributes:
        text: The text.
        answers: The first character and the end of each part that the template marks
            by `{% generation %}`.
    """

    text: str
    answers: list[tuple[int, int]]


class Template:
    """A chat template.

    Attributes:
        source: Its text.
        marks_answers: Whether it has `{% generation %}`.
    """

    def __init__(self, source: str, now: datetime.datetime | None = None):
        """Compiles a template.

        Args:
            source: Its text.
            now: What `strftime_now` says; the time of the rendering by default.

        Raises:
            ModelError: If it is no Jinja.
        """
        if len(source) > MAX_SOURCE:
            raise ModelError(
                f"a chat template must have at most {MAX_SOURCE} characters. Got "
                f"{len(source)}."
            )
        self.source = source
        self.marks_answers = (
            re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        )
        self._environment = _Environment(now)
        self._template = _guarded(lambda: self._environment.from_string(source))

    def render(self, values: Mapping[str, Any]) -> Rendering:
        """Returns what the template makes of the values of its names.

        Raises:
            ModelError: If it does what it must not.
            ValueError: If it fails, or refuses the messages.
        """
        text = _guarded(lambda: self._render(values))
        return _unmarked(text) if self.marks_answers else Rendering(text, [])

    def _render(self, values: Mapping[str, Any]) -> str:
        self._environment.left = BUDGET
        parts, length = [], 0
        for part in self._template.generate(**values):
            length += len(part)
            check_length(length)
            parts.append(part)
        return "".join(parts)


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


class _Ticking(compiler.CodeGenerator):
    """Spends the budget in each round of a loop, and bounds `~`."""

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body = [nodes.ExprStmt(tick), *node.body]
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _Ticking
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, now: datetime.datetime | None):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
        )
        self.left = BUDGET
        filters = {**self.filters, "tojson": _to_json}
        self.filters = {name: bounded_filter(name, f) for name, f in filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda fmt: (now or datetime.datetime.now()).strftime(fmt),
        }

    def tick(self) -> None:
        pass  # `call` counts

    @staticmethod
    def concat(parts: Any) -> str:
        return _joined(parts)

    @staticmethod
    def joined(parts: Any) -> str:
        return _joined(map(str, parts))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # The names cannot be those of arguments, as in the class above.
        __self.left -= 1
        if __self.left < 0:
            raise exceptions.SecurityError(f"It takes more than {BUDGET} steps.")
        # Jinja wraps `str.format`.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            check_call(getattr(__obj, "__name__", ""), owner, args, kwargs)
        found = super().call(__context, __obj, *args, **kwargs)
        check_length(found)
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Generation(ext.Extension):
    """`{% generation %}`: what the model is to write."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_END}"


class _Namespace(utils.Namespace):
    def __init__(*args: Any, **kwargs: Any):
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise exceptions.SecurityError(f"It sets {name!r} of a namespace.")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _joined(parts: Any) -> str:
    parts = [*parts]
    check_length(sum(map(len, parts)))
    return "".join(parts)
