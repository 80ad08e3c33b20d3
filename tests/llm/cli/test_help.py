"""The help of each command: words for types, groups, and every option; its imports."""

import json
import re

import pytest
from commands import run_python

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.options import options_of
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.cli.parser import COMMANDS

# Python's names of types and of missing values, which no help text may contain.
NO_WORDS = r"Any|Union|Optional|Literal|NoneType|None|null|<class|typing|MISSING"

OF_ALL_COMMANDS = {"config", "print_config", "json"}


def test_train_shows_the_options_that_people_set(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    listed = re.findall(r"^  --([a-z]\w*)(?=[ ,\n]|$)", out, re.M)
    assert {*listed} == {*app.TrainConfig.common} | OF_ALL_COMMANDS | {"help_all"}
    assert len(app.TrainConfig.common) == 25
    assert len(options_of(app.TrainConfig)) <= 60


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_in_words(capsys, command):
    flag = "--help-all" if command == "train" else "--help"
    with pytest.raises(SystemExit) as stopped:
        main([command, flag] if command else [flag])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert re.findall(rf"\b({NO_WORDS})\b", out) == []
    assert max(map(len, out.splitlines())) <= 88
    if command is None:
        return
    options = options_of(COMMANDS[command]).values()
    listed = re.findall(r"^  (?:--)?([a-z]\w*)(?=[ ,\n]|$)", out, re.M)
    assert {option.name for option in options} <= {*listed}
    # The sections come in order, and each has options.
    titles = dict.fromkeys(x.section for x in options if x.section is not None)
    assert re.findall(r"^([a-z ]+):$", out, re.M) == [
        *["options", *titles, "examples"],
    ]
    words = " ".join(out.split())
    required = {"score": "(--model MODEL | --run RUN) --data DATA"}
    required |= {"export": "(--model MODEL --out OUT | --run RUN)"}
    if command in required:
        assert out.startswith(f"usage: qlora-jax {command} {required[command]} [")
        assert words.count("Required without `run`") == 1 + (command == "export")
        assert ("--data DATA Required." in words) == (command == "score")
    if command != "train":
        return
    assert "(a number; default: 0.0002)" in words
    assert "(an integer; default: 16)" in words
    usage = "usage: qlora-jax train --model MODEL --data DATA --out OUT [options]\n"
    assert out.startswith(usage)


# Prints the modules that were imported once the program ends.
MODULES = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps([*sys.modules]), file=sys.stderr))
import qlora_jax_program
qlora_jax_program.process()
"""
# These take longer to import than the whole command may take, besides JAX.
HEAVY = {"flax", "grain", "optax", "orbax", "tokenizers", "transformers"}
HEAVY |= {"qlora_jax.io", "qlora_jax.llm.models.decoder", "qlora_jax.llm.train"}


def test_the_version_needs_no_jax():
    done = run_python("-c", MODULES, "--version")
    assert done.stdout == f"qlora-jax {ql.__version__}\n" and done.returncode == 0
    assert not {"jax", "numpy", "qlora_jax"} & {*json.loads(done.stderr)}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_imports_no_models(arguments):
    done = run_python("-c", MODULES, *arguments)
    assert done.stdout.startswith("usage: qlora-jax") and done.returncode == 0
    assert not HEAVY & {*json.loads(done.stderr)}
