"""Commands on folders of hostile files."""

import pytest
from commands import run
from hostile_files import commands_on, make_adapter, make_model


@pytest.mark.slow
def test_harmless_files_are_read(tmp_path, capsys):
    # Otherwise, the other tests would pass for any reason.
    model = make_model(tmp_path / "model")
    for arguments in commands_on(model, tmp_path).values():
        assert run(capsys, *arguments)[0] == 0
    adapter = ["--adapter", make_adapter(tmp_path / "adapter")]
    assert run(capsys, *commands_on(model, tmp_path)["generate"], *adapter)[0] == 0
