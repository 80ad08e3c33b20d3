"""The help of each command: words for types, groups, and every option."""

import dataclasses
import re

import pytest

from qlora_jax.llm.cli.main import main
from qlora_jax.llm.cli.parser import COMMANDS, GROUPS

# Python's names of types and of missing values, which no help text may contain.
NO_WORDS = r"Any|Union|Optional|Literal|NoneType|None|null|<class|typing|MISSING"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_in_words(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.findall(rf"\b({NO_WORDS})\b", out) == []
    assert max(map(len, out.splitlines())) <= 88
    if command is None:
        return
    fields = dataclasses.fields(COMMANDS[command])
    listed = re.findall(r"^  (?:--)?([a-z]\w*)(?=[ ,\n]|$)", out, re.M)
    names = [field.name for field in fields if field.name in listed]
    assert names == [field.name for field in fields]
    # The groups come in order, and each has options.
    titles = [*GROUPS.get(command, {}).values()]
    assert re.findall(r"^([a-z ]+):$", out, re.M) == [
        *["positional arguments"] * (command == "inspect"),
        *["options", *titles, "examples"],
    ]
    assert GROUPS.get(command, {}).keys() <= {*names}
    if command != "train":
        return
    words = " ".join(out.split())
    assert "(a number, or several separated by commas; default: 0.0002)" in words
    assert "(an integer; default: 16)" in words
    usage = "usage: qlora-jax train --model MODEL --data DATA --out OUT [options]\n"
    assert out.startswith(usage)
