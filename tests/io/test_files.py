"""Files and folders that are written completely or not at all."""

import os

import pytest

from qlora_jax.io.files import new_path


def test_the_old_folder_stays_if_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename, targets = os.replace, []

    def fail_for_the_new_folder(source, target):
        targets.append(target)
        if len(targets) == 2:
            raise OSError("the file system is gone")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_new_folder)
    with pytest.raises(OSError, match="the file system is gone"):
        with new_path(path) as new:
            new.mkdir()
            (new / "new").touch()
    assert os.listdir(path) == ["old"] and os.listdir(tmp_path) == ["folder"]
