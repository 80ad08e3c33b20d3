"""Reads the code and the tables of settings in the pages of docs/coming_from."""

import ast
import pathlib
import re
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).parent.parent / "docs/coming_from"
MISSING = object()  # a default that a table describes in words


class Side(NamedTuple):
    """One library's cells in a row of a table."""

    names: list[str]  # of settings
    default: object  # or MISSING


def read(page: str) -> str:
    return (FOLDER / f"{page}.md").read_text("utf-8")


def code_blocks(page: str, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, read(page), re.DOTALL | re.MULTILINE)


def tables(page: str) -> dict[str, list[list[str]]]:
    """Returns the rows of each table, by the table's first heading."""
    tables: dict[str, list[list[str]]] = {}
    for text in re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE):
        heading, _, *rows = text.splitlines()
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
        tables[heading.strip("|").split("|")[0].strip()] = cells
    return tables


def side(names: str, default: str) -> Side:
    """Reads two cells: the names in code, and the default if it begins with code."""
    match = re.match(r"`([^`]*)`(?:$|[:,])", default)
    return Side(re.findall(r"`([^`]+)`", names), parse(match[1]) if match else MISSING)


def parse(text: str) -> object:
    """Reads a value that is written as in Python, YAML or a command."""
    words = {"true": True, "false": False}
    try:
        return words[text] if text in words else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def assert_settings_exist(page: str, heading: str, defaults: dict) -> None:
    """Checks the settings of the other library, in the first two columns of a table.

    Args:
      page: The name of the page.
      heading: The heading of the table's first column.
      defaults: The defaults of the other library, by the names of the settings.
    """
    for names, default, *_ in tables(page)[heading]:
        setting = side(names, default)
        assert {*setting.names} <= {*defaults}, names
        if setting.default is not MISSING:
            [name] = setting.names
            assert defaults[name] == setting.default, (name, defaults[name])
