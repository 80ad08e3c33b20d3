"""The README is what it says: its code runs, its commands and links exist."""

import importlib.metadata
import pathlib
import re
import tomllib

import numpy as np
import pytest

import qlora_jax as ql

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "docs/design.md",
    "docs/kernels.md",
    "docs/pictures.md",
    "docs/traps.md",
]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_quick_start_runs(capsys):
    names: dict = {}
    for number, code in enumerate(blocks(README, "python")):
        exec(compile(code, f"README.md, block {number}", "exec"), names)
    ql = names["ql"]
    shapes = [
        names["merged"]["up"]["kernel"].shape,
        names["plain"].layers[0].kernel.shape,
    ]
    assert shapes == [(128, 256), (128, 256)]
    assert names["heads"].shape == (128, 4, 16)
    base, lora = ql.split(names["tree"])
    assert np.asarray(lora["layer"]["kernel"].b).any()
    np.testing.assert_array_equal(
        base["layer"]["kernel"].codes, names["base"]["layer"]["kernel"].codes
    )
    assert "nf4" in capsys.readouterr().out


def test_traps_run():
    for number, code in enumerate(
        blocks((ROOT / "docs/traps.md").read_text("utf-8"), "python")
    ):
        exec(compile(code, f"docs/traps.md, block {number}", "exec"), {})


def test_commands_name_what_exists():
    commands = "".join(blocks(README, "bash"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = extras["project"]["optional-dependencies"]
    for name in re.findall(r"\[(\w+)\]", commands):
        assert name in extras
    for path in re.findall(r"\bpython (\S+\.py)", commands):
        assert (ROOT / path).is_file()
    # CI runs the README's test command.
    tests = "pytest -n 2 --dist worksteal"
    assert tests in commands
    assert tests in (ROOT / ".ci/run").read_text("utf-8")


def test_the_version_is_that_of_the_package_and_of_the_newest_release():
    assert importlib.metadata.version("qlora-jax") == ql.__version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    releases = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    assert re.fullmatch(rf"{ql.__version__} - \d{{4}}-\d\d-\d\d", releases[1])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target
