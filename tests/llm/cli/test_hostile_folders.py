"""Commands on folders of hostile files."""

import ast
import pathlib

import pytest
from commands import run
from hostile_files import commands_on, make_adapter, make_model

import qlora_jax as ql

PACKAGE = pathlib.Path(ql.__file__).parent


@pytest.mark.slow
def test_harmless_files_are_read(tmp_path, capsys):
    # Otherwise, the other tests would pass for any reason.
    model = make_model(tmp_path / "model")
    for arguments in commands_on(model, tmp_path).values():
        assert run(capsys, *arguments)[0] == 0
    adapter = ["--adapter", make_adapter(tmp_path / "adapter")]
    assert run(capsys, *commands_on(model, tmp_path)["generate"], *adapter)[0] == 0


def test_transformers_never_runs_code_of_a_folder():
    # `None`, the default, asks on standard input.
    unsafe = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            values = [
                ast.unparse(keyword.value)
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code"
            ]
            if name in ("from_pretrained", "from_config") and values != ["False"]:
                unsafe.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert not unsafe
