"""The tables of docs/choose.md agree with the library and with docs/scale/fit.md."""

import pathlib
import re

import jax.numpy as jnp
import pytest
from stored import draw_peft

import qlora_jax as ql
from qlora_jax.llm.app.exporting.pairing import MERGED, Pair, open_pair
from qlora_jax.llm.app.servers import SERVERS
from qlora_jax.llm.cli.parser import parse
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.train.objectives import OBJECTIVES

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "choose.md").read_text("utf-8")


def table(section: str) -> list[list[str]]:
    """Returns the rows of the table in a section, without its headings."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    text = text.replace(r"\|", "or")  # escaped, because they do not separate cells
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)[2:]
    assert rows
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"), torch_dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    shapes = {"model.layers.0.mlp.down_proj": (64, 128)}
    draw_peft(folder, shapes, target_modules=[*shapes])
    return str(folder)


def describe(pair: Pair) -> str:
    """Returns the cell of the table for a server's base and adapter."""
    if pair.exact:
        return "exact"
    return "merged" if pair.adapter == MERGED else "rounded"


def test_formats_by_server(model, adapter):
    rows = table("A format, by server")
    assert len(rows) == 10
    for option, bits, *cells in rows:
        source = ["--model", model, "--adapter", adapter, "--out=x"]
        arguments = [*source, "--fmt", *in_code(option)[0].split()]
        descriptions = []
        for server in SERVERS:
            _, config, _ = parse(["export", "--for", server, *arguments])
            descriptions.append(describe(open_pair(config)[2]))
        assert cells == descriptions, option
        if config.fmt != "none":
            settings = {"fmt": config.fmt, "block_size": config.block_size}
            packed = ql.quantize(jnp.ones((1024, 512)), **settings)
            assert f"{packed.bits_per_param:.4g}" == bits
    assert len(cells) == len(SERVERS)


def test_the_headings_are_the_servers():
    [heading] = re.findall(r"^\| `--fmt` \| bits per weight \|(.*)\|$", PAGE, re.M)
    names = [name.strip().lower().removesuffix("-lm") for name in heading.split("|")]
    assert sorted(names) == sorted(SERVERS)


def test_objectives():
    names = {name for row in table("An objective, by data") for name in in_code(row[1])}
    assert {name.split()[0] for name in names} == {*OBJECTIVES} - {"ipo"}


def test_memory_has_the_order_of_the_page_fit():
    options = [in_code(row[1])[0] for row in table("Memory: what to turn on, in order")]
    fit = (DOCS / "scale/fit.md").read_text("utf-8")
    # The items have settings as in YAML, such as `remat: offload`. The first is not in
    # the table.
    [_, *settings] = re.findall(r"^\d\. \*\*.*?`(.*?)`", fit, re.MULTILINE)
    assert [f"--{setting.replace(':', '')}" for setting in settings] == options


def test_options_are_accepted(model):
    options = [row[1] for row in table("Memory: what to turn on, in order")]
    options += [f"`--engine {in_code(row[0])[0]}`" for row in table("An engine")]
    options += [
        f"`--dtype {in_code(row[1])[0]}`" for row in table("A dtype, by device")
    ]
    required = ["train", "--model", model, "--data", "D", "--out", "R"]
    for option in options:
        parse(required + in_code(option)[0].split())
