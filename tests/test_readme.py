"""Code in the README and on the site runs, and commands and links are valid."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import shlex
import tomllib
import types

import jax
import numpy as np
import pytest
import yaml

import qlora_jax as ql
from qlora_jax.llm import app, data, train
from qlora_jax.llm.cli import main

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCS = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", *DOCS]
TRAPS = "docs/development/traps.md"


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(page: str, capsys) -> dict:
    """Runs a page's blocks in order, and compares what they print with the page.

    A plain block directly after a Python block has the expected output.
    """
    fence = r"^```python\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?"
    blocks = re.findall(fence, read(page), re.DOTALL | re.MULTILINE)
    names: dict = {}
    for number, (code, printed) in enumerate(blocks):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
        assert capsys.readouterr().out == printed or not printed
    return names


def test_readme_runs(capsys):
    names = run("README.md", capsys)
    assert names["merged"]["layers_0"]["kernel"].shape == (128, 256)
    assert np.asarray(names["lora"]["layers_0"]["kernel"].b).any()


WITH_CODE = [page for page in DOCS if blocks(read(page), "python") and page != TRAPS]
PYTORCH = "docs/guides/pytorch.md"
needs_torchax = pytest.mark.skipif(
    importlib.util.find_spec("torchax") is None, reason="needs the extra `torch`"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[needs_torchax] if page == PYTORCH else [])
        for page in WITH_CODE
    ],
)
def test_pages_run(page, capsys):
    # Use JAX's default option, as users and the libraries in the guides do.
    with jax.numpy_rank_promotion("allow"):
        assert run(page, capsys)


@pytest.mark.slow
def test_traps_run():
    for number, code in enumerate(blocks(read(TRAPS), "python")):
        exec(compile(code, f"{TRAPS}, block {number}", "exec"), {})


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_every_public_name_is_in_the_api_reference():
    reference = "".join(
        map(read, (page for page in DOCS if page.startswith("docs/api/")))
    )
    listed = re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)
    assert len(listed) == len(set(listed))
    public = [f"qlora_jax.{name}" for name in ql.__all__]
    for name in ql.__all__:
        if isinstance(module := getattr(ql, name), types.ModuleType):
            public.remove(f"qlora_jax.{name}")
            public += [f"qlora_jax.{name}.{inside}" for inside in module.__all__]
    for module in (data, train, app):
        public += [f"{module.__name__}.{name}" for name in module.__all__]
    models = "qlora_jax.llm.models.", "qlora_jax.llm.gguf."
    # `ql.torch` needs an extra, so its source says which names it has.
    source = (ROOT / "qlora_jax/torch/__init__.py").read_text("utf-8")
    torch_names = ast.literal_eval(source.partition("__all__ = ")[2])
    public += [f"qlora_jax.torch.{name}" for name in torch_names]
    outside_models = [name for name in listed if not name.startswith(models)]
    assert sorted(outside_models) == sorted(public)


def test_commands_name_what_exists():
    commands = "".join("".join(blocks(read(page), "bash")) for page in PAGES)
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[(\w+)\]", commands):
        assert name in extras
    for path in re.findall(r"\bpython (\S+\.py)", commands):
        assert (ROOT / path).is_file()
    # CI runs the README's test command, with the slow tests.
    tests = "pytest -n 2 --dist worksteal"
    assert tests in "".join(blocks(README, "bash"))
    assert f"{tests} --all" in read(".ci/run")


def commands_of(page: str) -> list[str]:
    """Returns the `qlora-jax` command lines in the bash blocks of a page."""
    lines = "".join(blocks(read(page), "bash")).replace("\\\n", " ").splitlines()
    return [
        part.partition(" < ")[0]
        for line in lines
        for part in re.split(r" && | {2,}# ", line)
        if part.startswith("qlora-jax ")
    ]


class Read(Exception):
    """Raised once a command line has been parsed, to stop before it runs."""


def test_the_command_line_takes_the_commands_of_all_pages(tmp_path):
    file = tmp_path / "run.yaml"  # for pages that use a config file

    def prepare():
        raise Read

    commands = [line for page in PAGES for line in commands_of(page)]
    assert len(commands) > 20
    for line in commands:
        _, *arguments = shlex.split(line, comments=True)
        if "--config" in arguments:
            arguments[arguments.index("--config") + 1] = str(file)
        file.write_text(
            "{model: M, data: D%s}" % (", out: R" * (arguments[0] == "train"))
        )
        try:
            with pytest.raises(Read):
                main._run(arguments, prepare)
        except SystemExit:
            pytest.fail(line)


def test_the_version_is_that_of_the_package_and_of_the_newest_release():
    assert importlib.metadata.version("qlora-jax") == ql.__version__
    changes = read("CHANGELOG.md")
    assert len(changes.split()) <= 700
    releases = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    citation = yaml.safe_load(read("CITATION.cff"))
    date = citation["date-released"].isoformat()
    assert releases[:2] == ["[Unreleased]", f"[{ql.__version__}] - {date}"]
    assert citation["version"] == ql.__version__


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page)):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
