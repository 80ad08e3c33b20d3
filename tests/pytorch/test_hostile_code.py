"""No command runs code from the folder of a model, whatever is typed."""

import io
import sys

import pytest
from engine_models import save_model
from hostile_files import add_code, change_json, commands_on, make_model
from transformers import GPTNeoXConfig

from qlora_jax.llm.cli.main import main

FILES = "config.json", "tokenizer_config.json", "processor_config.json"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["unknown", "native", "torch"])
def test_commands_run_no_code_of_a_folder(file, kind, tmp_path, monkeypatch, capsys):
    # The model is of a type that nothing has, that `Decoder` has, or transformers.
    model = tmp_path / "model"
    make_model(model) if kind != "torch" else save_model(model, GPTNeoXConfig)
    if kind == "unknown":
        change_json(model / "config.json", model_type="evil")
    marker = tmp_path / "code-has-run"
    add_code(model, file, marker)
    commands = commands_on(model, tmp_path)
    commands["chat"] = commands["generate"][:3]  # reads its prompts from standard input
    for name, arguments in commands.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
        status = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert not marker.exists(), name
        assert "[y/N]" not in out + err
        if status:
            [*_, error] = err.splitlines()
            assert error.startswith(f"qlora-jax {arguments[0]}: "), err
            assert "trust_remote_code" not in error
        if kind == "unknown":
            assert status == 1 and "`model_type`" in error and "'evil'" in error
