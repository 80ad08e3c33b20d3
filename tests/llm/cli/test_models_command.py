"""`qlora-jax models`: its tables are those of the page, and list every family."""

import json
import pathlib
import re

import pytest

from qlora_jax.llm.cli.main import main
from qlora_jax.llm.models.families import FAMILIES, config_from_hf

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "models.md"


def test_the_page_has_the_tables_that_the_command_prints(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out.strip().split("\n\n")
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text("utf-8"), re.M)
    assert [table.strip() for table in tables] == printed


def test_every_model_type_is_listed_once(capsys):
    assert main(["models", "--json"]) == 0
    families = json.loads(capsys.readouterr().out)["families"]
    model_types = [name for family in families for name in family["model_types"]]
    assert sorted(model_types) == sorted(FAMILIES)
    [oss] = [family for family in families if family["title"] == "gpt-oss"]
    assert oss["fixed"].keys() >= {"swiglu_alpha", "swiglu_limit"}
    assert "sliding_window" in oss["options"] and oss["gguf"]


def test_an_unknown_family_is_refused_with_its_relatives():
    with pytest.raises(
        ValueError, match=r"docs/models.md.*relatives are .*'qwen3_moe'"
    ):
        config_from_hf({"model_type": "qwen4_moe"})
    with pytest.raises(ValueError, match=r"Got 'mamba2'\.$"):
        config_from_hf({"model_type": "mamba2"})
