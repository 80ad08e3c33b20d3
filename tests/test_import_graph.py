"""Imports go down the layers without cycles, and load no heavy libraries."""

import ast
import graphlib
import importlib.util
import os
import pathlib
import pkgutil
import subprocess
import sys

import flax
import pytest

import qlora_jax as ql

PACKAGE = pathlib.Path(ql.__file__).parent
LAYERS = [["_jax"], ["quant"], ["product"], ["adapters"], ["trees", "losses", "memory"]]
LAYERS += [["linen", "optim", "io"], ["nnx"], ["__init__"], ["llm", "torch"]]
# What the application and `torch` import from the library: public names, like any user,
# and how the library reads files and names leaves.
AS_USERS = {"qlora_jax"} | {f"qlora_jax.{x}" for x in ("io", "linen", "nnx", "optim")}
AS_USERS |= {f"qlora_jax.io.{x}" for x in ("files", "model_folder", "tensors")}
AS_USERS |= {"qlora_jax.trees.paths"}
LLM_LAYERS = [
    ["lazy", "reading", "printable"],
    ["models", "gguf"],
    ["data"],
    ["train"],
    ["app"],
    ["cli"],
]


def numbered(layers: list[list[str]]) -> dict[str, int]:
    return {name: number for number, names in enumerate(layers) for name in names}


LAYER, LLM_LAYER = numbered(LAYERS), numbered(LLM_LAYERS)


def llm_layer(name: str) -> int:
    """Returns the layer of a module of `qlora_jax.llm`, which is itself the lowest."""
    parts = name.split(".")
    return LLM_LAYER[parts[2]] if len(parts) > 2 else 0


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The modules, as opposed to attributes, that `from flax import ...` may name.
FLAX = {f"flax.{module.name}" for module in pkgutil.iter_modules(flax.__path__)}
SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported_names(name: str) -> set[str]:
    """Returns every dotted name that a module imports anywhere in its code."""
    is_package = SOURCES[name].name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            parents = parts[: len(parts) - node.level + 1] if node.level else []
            source = ".".join(parents + ([node.module] if node.module else []))
            for alias in node.names:
                inside = f"{source}.{alias.name}"
                is_module = inside in SOURCES or inside in FLAX
                names.add(inside if is_module else source)
    return names


GRAPH = {name: {n for n in imported_names(name) if n in SOURCES} for name in SOURCES}


def folder(name: str) -> str:
    """Returns the top-level folder or file of the package that a module belongs to."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_module_has_a_layer():
    assert {folder(name) for name in SOURCES} == set(LAYER)


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"qlora_jax"}))
def test_imports_run_down(name):
    def is_allowed(imported):
        if folder(name) == "torch" and folder(imported) != "torch":
            return imported in AS_USERS
        if folder(name) != "llm":
            is_below = LAYER[folder(imported)] < LAYER[folder(name)]
            return is_below or folder(imported) == folder(name)
        if folder(imported) != "llm":
            return imported in AS_USERS
        return llm_layer(imported) <= llm_layer(name)

    assert [n for n in sorted(GRAPH[name]) if not is_allowed(n)] == []


def test_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_public_jax_only(name):
    names = imported_names(name)
    assert not [n for n in names if n.startswith(("jax._src", "jaxlib"))]
    assert "__future__" not in names


@pytest.mark.parametrize(
    "library, folders",
    [
        ("flax.linen", {"linen", "nnx", "llm"}),
        ("flax.nnx", {"nnx"}),
        ("flax", {"_jax", "linen", "nnx", "llm"}),
        ("optax", {"optim", "llm"}),
        ("grain", {"llm"}),
        ("jinja2", set()),
        ("torch", {"torch"}),
        ("torchax", {"torch"}),
        ("transformers", {"llm", "torch"}),
        ("safetensors", {"io"}),
    ],
)
def test_who_may_import(library, folders):
    """Checks that exactly these folders import the library."""

    def is_used(n):
        return n == library or n.startswith(library + ".")

    imports = {name: imported_names(name) for name in SOURCES}
    assert {folder(n) for n in SOURCES if any(map(is_used, imports[n]))} == folders


# `qlora_jax.torch` needs an extra.
HAS_TORCHAX = importlib.util.find_spec("torchax") is not None
INSTALLED = sorted(n for n in SOURCES if HAS_TORCHAX or folder(n) != "torch")
INITS = [n for n in SOURCES if n.count(".") < 2 and SOURCES[n].stem == "__init__"]


@pytest.mark.parametrize("name", INITS)
def test_init_holds_names_only(name):
    names = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign | ast.If
    for node in TREES[name].body:
        is_lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        assert is_lazy or isinstance(node, names)


def run(code: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    run(
        "import sys, qlora_jax\n"
        "heavy = {'flax', 'grain', 'jinja2', 'matplotlib', 'optax', 'orbax',"
        " 'safetensors', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from qlora_jax import *\n"
        "assert 'flax' in sys.modules"
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", [["qlora_jax"], INSTALLED], ids=["root", "all"])
def test_import_starts_no_backend(names):
    # JAX takes the number of devices only until a backend runs. A constant made by
    # `jnp` while a module is imported would start one.
    run(
        f"import jax, {', '.join(names)}\n"
        "assert qlora_jax.__version__\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3, jax.device_count()"
    )
