"""A Jinja sandbox that stops templates which take too much time or memory.

Operators, calls, filters, loops and literals count the bytes that they are about to
allocate. A rendering may allocate a certain sum, in a certain time.
"""

import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import wraps
from inspect import unwrap
from typing import Any

from jinja2 import nodes, pass_context, sandbox
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS, MAX_BYTES = 10, 512 << 20
MAX_SOURCE = 1 << 17  # characters of a template
_MAX_BITS = 1 << 20  # of an integer
_STEP = 100  # bytes of a call, of a step of a loop, and of an output
# Chat templates do not need these filters and methods, whose time is hard to bound.
_REMOVED = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_UNSAFE = ("encode", "to_bytes")  # some codecs take quadratic time
# These filters do not write or nest the elements of a list.
_SHALLOW = {"count", "d", "default", "first", "items", "last", "length", "list", "map"}
_SHALLOW |= {"reject", "rejectattr", "reverse", "select", "selectattr"}
# These filters and methods repeat a value as often as an argument or its length says.
_REPEATING = {"batch", "center", "expandtabs", "indent", "join", "ljust", "rjust"}
_REPEATING |= {"slice", "tojson", "translate", "zfill"}
# These filters and methods make a list from a text.
_SPLITTING = {"groupby", "list", "rsplit", "slice", "sort", "split", "splitlines"}
_SPLITTING |= {"unique"}


class LimitError(Exception):
    """A template takes too much time or memory."""


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # without the attributes, whose size is unknown


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """A sandbox whose limits hold from each call of `start` on."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any):
        # Without the optimizer, compiling a template does not compute anything.
        super().__init__(optimized=False, finalize=self._count_output, **options)
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        for name in _REMOVED:
            del self.filters[name]
        self.start()

    def start(self) -> None:
        """Resets the time and the bytes."""
        self._end, self._bytes = time.monotonic() + MAX_SECONDS, MAX_BYTES

    def compile_tree(self, tree: nodes.Template) -> Any:
        """Returns the template of a syntax tree, with checks."""
        guarded = {name: self._guard(name, f) for name, f in self.filters.items()}
        self.filters = guarded | {
            "_step": self._count_steps,
            "_join": lambda parts: self.concat(map(str, map(self._count_text, parts))),
            "_slice": self._count_slice,
            "_new": self._count_new,
        }
        return self.from_string(_InsertChecks().visit(tree))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes an operation of a template, after counting its result."""
        if operator == "+":
            # The parts of the longer list have been checked when it was made.
            are_lists = all(isinstance(x, list | tuple) for x in (left, right))
            parts = min(left, right, key=len) if are_lists else None
            self._spend(sys.getsizeof(left) + sys.getsizeof(right), parts)
        elif operator == "%" and isinstance(left, str):
            self._count_format(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            is_power = operator == "**"
            self._check_bits(bits * right if is_power else bits + right.bit_length())
        elif operator == "*":
            number, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(number, int):
                self._spend(self._size_of(value) * max(number, 0))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function of a template, after counting its result."""
        self._spend(_STEP)
        method = unwrap(function)  # Jinja wraps `str.format`
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if not isinstance(owner, str | int):
            # Such a function returns a text that has been counted, or what exists, in
            # a new list at most.
            result = super().call(context, function, *args, **kwargs)
            return result if isinstance(result, str) else self._count_new(result)
        if name in _UNSAFE:
            raise SecurityError(f"it must not call {name}.")
        if name == "join":  # an iterator can be read only once
            args = (list(args[0]),)
        self._count_call(name, owner, [*args, *kwargs.values()])
        return self._count_new(super().call(context, function, *args, **kwargs))

    def concat(self, texts: Iterable[str]) -> str:  # type: ignore
        """Joins pieces of text. Jinja calls this method for all texts of a template."""
        pieces = []
        for text in texts:
            self._spend(sys.getsizeof(text))
            pieces.append(text)
        return "".join(pieces)

    def _guard(self, name: str, function: Callable) -> Callable:
        num_passed = int(hasattr(function, "jinja_pass_arg"))  # such as the context

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            passed, (value, *others) = args[:num_passed], args[num_passed:]
            if name == "join":
                value = list(value)
            if name not in _SHALLOW:
                self._count_text(value)
            self._count_call(name, value, [*others, *kwargs.values()])
            return self._count_new(function(*passed, value, *others, **kwargs))

        return guarded

    def _count_call(self, name: str, value: Any, arguments: list[Any]) -> None:
        if name == "replace":
            old, new = (str(x) for x in [*arguments, "", ""][:2])
            self._spend(str(value).count(old) * len(new))
        elif name in ("format", "format_map"):
            self._count_format(str(value), arguments)
        elif name in _REPEATING or name == "round":
            counts = [x if isinstance(x, int) else self._size_of(x) for x in arguments]
            count = max(map(abs, counts), default=0)
            # Rounding to n digits computes 10**n.
            self._spend(count * (count if name == "round" else self._size_of(value)))
        if name in _SPLITTING and isinstance(value, str):
            separators = [x for x in arguments if isinstance(x, str) and x]
            # A part of two characters and a space take 60 bytes.
            num_bytes = (
                60 * value.count(separators[0]) if separators else 20 * len(value)
            )
            self._spend(num_bytes)
        elif name == "int" and isinstance(value, str):
            self._spend(len(value) ** 2)

    def _count_format(self, text: str, values: Any) -> None:
        if re.search(r"%[-+ #0-9.]*\*|\{[^{}]*\{", text.replace("{{", "")):
            raise LimitError("must not take the width of a text from a value.")
        width = max(map(int, re.findall(r"\d+", text)), default=0)
        num_values = text.count("%") + text.count("{")
        self._spend(num_values * (width + self._size_of(values)))

    @pass_context
    def _count_output(self, context: Any, value: Any) -> Any:
        del context  # Jinja would write constants early without this parameter
        self._spend(_STEP)
        return value if isinstance(value, str) else self._count_text(value)

    def _count_steps(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(_STEP)
            yield value

    def _count_slice(self, value: Any) -> Any:
        self._spend(sys.getsizeof(value))
        return value

    def _count_new(self, value: Any) -> Any:
        # The parts exist already, so that their sizes are not counted again.
        if isinstance(value, int):
            self._check_bits(value.bit_length())
        is_text = isinstance(value, str)
        self._spend(sys.getsizeof(value), None if is_text else value)
        return value

    def _count_text(self, value: Any) -> Any:
        self._spend(self._size_of(value))
        return value

    def _size_of(self, value: object) -> int:
        # A part that a value contains twice is counted twice, as in the value's text,
        # which can be much longer than the memory of the value.
        size, values = 0, [value]
        while values and size <= self._bytes and time.monotonic() < self._end:
            value = values.pop()
            size += sys.getsizeof(value)
            if isinstance(value, str | int | float):
                continue
            if isinstance(value, Mapping):
                values += [*value, *value.values()]
            elif isinstance(value, Collection):
                values += value
        return size

    def _check_bits(self, num_bits: int) -> None:
        if num_bits > _MAX_BITS:
            raise LimitError(f"must compute with integers of at most {_MAX_BITS} bits.")

    def _spend(self, size: int, parts: object = None) -> None:
        self._bytes -= size
        needed = 0 if parts is None else self._size_of(parts)
        if self._bytes < needed or time.monotonic() > self._end:
            raise LimitError(
                f"must take at most {MAX_SECONDS} seconds and {MAX_BYTES >> 20} MiB."
            )


class _InsertChecks(NodeTransformer):
    """Passes values to the filters that count what Jinja computes by itself."""

    def visit_For(self, node: Any) -> Any:
        node.iter = _filter("_step", node.iter)
        return self.generic_visit(node)

    def visit_Concat(self, node: Any) -> Any:
        self.generic_visit(node)
        return _filter("_join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: Any) -> Any:
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter("_slice", node.node)
        return self.generic_visit(node)

    def visit_List(self, node: Any) -> Any:
        self.generic_visit(node)
        # A tuple may also be the target of an assignment.
        is_value = getattr(node, "ctx", "load") == "load"
        return _filter("_new", node) if is_value else node

    visit_Dict = visit_Tuple = visit_List


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
