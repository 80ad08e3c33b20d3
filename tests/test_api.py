"""Docstrings of public names must describe what their signatures have.

Examples in docstrings run as doctests.
"""

import ast
import dataclasses
import importlib.util
import inspect
import pathlib
import pkgutil
import re

import pytest

import qlora_jax as ql
from qlora_jax.llm import app, data, train

PACKAGE = pathlib.Path(ql.__file__).parent
# `ql.torch` needs an extra, and is not in `ql.__all__`.
TORCH = [ql.torch] if importlib.util.find_spec("torchax") else []
MODELS = PACKAGE.parent / "docs" / "api" / "models.md"


def public_objects():
    """Yields the functions and classes in `__all__` of the package and its modules.

    `models` has no `__all__`: its public names are those that its page lists.
    """
    for name in ql.__all__:
        value = getattr(ql, name)
        if not inspect.ismodule(value):
            yield f"ql.{name}", value
            continue
        for inner in value.__all__:
            yield f"ql.{name}.{inner}", getattr(value, inner)
    for module in (data, train, app, *TORCH):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)
    for name in re.findall(r"^::: qlora_jax\.(\S+)$", MODELS.read_text(), re.M):
        module, _, last = name.rpartition(".")
        yield name, pkgutil.resolve_name(f"qlora_jax.{module}:{last}")


def members(name, cls):
    """Yields names and values of methods and properties defined in a public class."""
    for attribute in dir(cls):
        if attribute.startswith("_") and attribute != "__call__":
            continue
        owner = next((c for c in cls.__mro__ if attribute in vars(c)), None)
        if owner is None or not owner.__module__.startswith("qlora_jax."):
            continue
        value = vars(owner)[attribute]
        value = getattr(value, "__func__", value)  # of a class method
        is_own = getattr(value, "__module__", None) == owner.__module__
        if isinstance(value, property) or (inspect.isfunction(value) and is_own):
            yield f"{name}.{attribute}", value


PUBLIC = dict(public_objects())
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
MEMBERS = {n: v for name, cls in CLASSES.items() for n, v in members(name, cls)}
PROPERTIES = {n: v for n, v in MEMBERS.items() if isinstance(v, property)}
FUNCTIONS = {
    name: value
    for name, value in {**PUBLIC, **MEMBERS}.items()
    if inspect.isfunction(value)
}


MOST_PUBLIC = 78  # callables outside `ql.torch` and `qlora_jax.llm`; the goal is 60


def test_public_names_do_not_grow():
    core = sorted(x for x in PUBLIC if x.startswith("ql.") and callable(PUBLIC[x]))
    print(*core, sep="\n")
    assert len(core) <= MOST_PUBLIC


ERRORS = ("FileNotFoundError", "ImportError", "IndexError", "NotImplementedError")
ERRORS += ("FloatingPointError", "OSError", "TypeError", "ValueError")
ERRORS += ("KeyboardInterrupt", "SystemExit")


def section(value, title):
    """Returns the names that a docstring section lists, or None without the section."""
    doc = inspect.getdoc(value) or ""
    match = re.search(rf"^{title}:\n((?: {{4}}.*\n?|\n)+)", doc, re.MULTILINE)
    if match is None:
        return None
    return re.findall(r"^ {4}(\*{0,2}\w+):", match[1], re.MULTILINE)


def parameters(function):
    """Returns the parameters of a function, as a docstring names them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    params = list(inspect.signature(function).parameters.values())
    names = [stars.get(param.kind, "") + param.name for param in params]
    is_method = "." in function.__qualname__
    return names[is_method:]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_and_return(name):
    function = FUNCTIONS[name]
    assert (section(function, "Args") or []) == parameters(function)
    is_procedure = function.__annotations__["return"] is None
    results = [section(function, title) for title in ("Returns", "Yields")]
    # Google's style allows a first sentence that describes what is returned.
    is_said = results != [None, None] or inspect.getdoc(function).startswith("Returns ")
    assert is_said != is_procedure
    # The class has an example. A method may have the docstring of its protocol.
    assert name in MEMBERS or ">>>" in function.__doc__
    for error in section(function, "Raises") or []:
        assert error in ERRORS or issubclass(PUBLIC[f"ql.io.{error}"], Exception)


@pytest.mark.parametrize("name", CLASSES)
def test_classes_say_what_they_hold(name):
    cls = CLASSES[name]
    is_record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")  # NamedTuple
    fields = [*cls.__annotations__] if is_record else []
    hidden = ("parent", "name") if "parent" in fields else ()  # Flax's
    fields = [f for f in fields if f not in hidden and not f.startswith("_")]
    assert (section(cls, "Attributes") or []) == fields
    if "__init__" in vars(cls) and not is_record:
        assert section(cls.__init__, "Args") == parameters(cls.__init__)
    assert ">>>" in cls.__doc__


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_have_a_docstring_and_a_type(name):
    assert inspect.getdoc(PROPERTIES[name])  # or its protocol's
    assert "return" in PROPERTIES[name].fget.__annotations__


def private_classes():
    """Returns the names of private classes of this package."""
    nodes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return classes - {name.rpartition(".")[2] for name in PUBLIC}


PRIVATE = private_classes()


@pytest.mark.parametrize("name", [*PUBLIC, *MEMBERS])
def test_docstrings_name_no_private_code(name):
    doc = inspect.getdoc({**PUBLIC, **MEMBERS}[name])
    assert not PRIVATE & {*re.findall(r"`(?:\w+\.)*(\w+)", doc)}
    # Other modules inside the package are private.
    modules = {*re.findall(r"\b(?:ql|qlora_jax)\.(\w+)\.\w+", doc)}
    assert modules <= {*ql.__all__, "llm", "torch"}


def test_exports_are_sorted_and_real():
    modules = ql.io, ql.linen, ql.losses, ql.memory, ql.nnx, ql.optim, ql.sharding
    modules = *modules, data, train, app, *TORCH
    for module in (ql, *modules):
        assert sorted(module.__all__) == [*module.__all__]
        assert module.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ql.nothing


def test_messages_have_no_article_before_the_name_of_a_type():
    """ "a AdaptedKernel" would be wrong, and so would "an LoRA"."""
    for path in pathlib.Path(ql.__file__).parent.rglob("*.py"):
        text = re.sub(r'"\s*f?"', "", path.read_text())  # strings are joined
        articles = re.findall(r"\b[Aa]n? \{(?:type\(\w+\)|\w+)\.__name__\}", text)
        assert not articles, (path, articles)
