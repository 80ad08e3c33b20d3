"""The table of docs/models.md, and unknown families."""

import pathlib
import re

import pytest

from qlora_jax.llm.models.families import FAMILIES, config_from_hf

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "models.md"


def test_every_model_type_is_in_the_table_once():
    rows = re.findall(
        r"^\|[^|]*\|[^|]*\|([^|]*`[^|]*)\|", PAGE.read_text("utf-8"), re.M
    )
    model_types = re.findall(r"`(\w+)`", " ".join(rows[1:]))  # without the heading
    assert sorted(model_types) == sorted(FAMILIES)


def test_an_unknown_family_is_refused_with_its_relatives():
    with pytest.raises(
        ValueError, match=r"docs/models.md.*relatives are .*'qwen3_moe'"
    ):
        config_from_hf({"model_type": "qwen4_moe"})
    with pytest.raises(ValueError, match=r"Got 'mamba2'\.$"):
        config_from_hf({"model_type": "mamba2"})
