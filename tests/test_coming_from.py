"""The settings in the tables of docs/coming_from exist, with these defaults."""

import dataclasses

import pytest
from coming_from import FOLDER, MISSING, side, tables

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.options import REQUIRED, options_of

# The first heading of each table of settings. Our names and defaults are in the last
# two columns.
TABLES = [
    ("peft_trl", "PEFT and TRL"),
    ("unsloth", "unsloth"),
    ("maxtext", "MaxText"),
    ("tunix", "`tunix.cli.peft_main`"),
    ("tunix", "qwix"),
]


def our_defaults(page: str, heading: str) -> dict[str, object]:
    if (page, heading) == ("tunix", "qwix"):
        return {x.name: x.default for x in dataclasses.fields(ql.QLoRAConfig)}
    return {name: x.default for name, x in options_of(app.TrainConfig).items()}


@pytest.mark.parametrize("page, heading", TABLES)
def test_our_settings(page, heading):
    defaults = our_defaults(page, heading)
    rows = tables(page)[heading]
    assert len(rows) > 7
    for *_, names, default in rows:
        setting = side(names, default)
        assert {*setting.names} <= {*defaults}, names
        assert setting.names or names == "no setting"
        if setting.default is not MISSING:
            [name] = setting.names
            assert defaults[name] == setting.default, name
        elif default == "required":
            assert defaults[setting.names[0]] is REQUIRED


def test_all_pages_have_a_table():
    assert {page for page, _ in TABLES} == {path.stem for path in FOLDER.glob("*.md")}
