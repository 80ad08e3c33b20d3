"""What `--log` writes, read from the files of W&B and trackio, without a network."""

import contextlib
import json
import struct
from types import SimpleNamespace

import pytest

from qlora_jax.llm import app
from qlora_jax.llm.app.training.loggers import open_loggers

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [dict(step=step, loss=1 / step, valid_loss=None) for step in (1, 2, 3)]


@pytest.fixture
def run(tmp_path):
    settings = dict(model="m", data="d", out=str(tmp_path / "run"))
    settings |= dict(log="wandb, trackio")
    config = app.TrainConfig.from_settings(settings)
    (tmp_path / "run").mkdir()
    return SimpleNamespace(config=config, folder=tmp_path / "run")


def read_wandb(path):
    """Returns the id of a run, and the step and loss of each row."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, rows, name = path.read_bytes(), 7, [], None
    while offset < len(data):  # a checksum, the length, and 1 for a complete record
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        assert kind == 1 and len(data) < 1 << 15  # one block
        record = Record.FromString(data[offset + 7 : offset + 7 + length])
        offset, name = offset + 7 + length, record.run.run_id or name
        items = record.history.item
        row = {x.key or x.nested_key[0]: json.loads(x.value_json) for x in items}
        rows += [(row["_step"], row["loss"])] if row else []
    return name, rows


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Returns a function that reads a run's steps and losses from W&B and trackio."""
    import trackio.utils
    import wandb
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")

    def read(folder, number):
        wandb.teardown()  # the service has written its files
        files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        wandb_runs = [*map(read_wandb, files)]
        assert {name for name, _ in wandb_runs} == {number}
        logs = SQLiteStorage.get_logs("qlora-jax", f"{folder.name}-{number}")
        assert not any("valid_loss" in row for row in logs)
        pairs = [(row["step"], row["loss"]) for row in logs]
        return [pair for _, rows in wandb_runs for pair in rows], pairs

    return read


def test_wandb_and_trackio_have_the_metrics(run, tmp_path, offline, capsys):
    """Two concurrent runs have separate logs, also after they resume."""
    (tmp_path / "two").mkdir()
    runs = [run, SimpleNamespace(config=run.config, folder=tmp_path / "two")]
    for after, rows in ((None, ROWS[:2]), (2, ROWS[2:])):
        with contextlib.ExitStack() as stack:
            watches = [stack.enter_context(open_loggers(x, after)) for x in runs]
            for row in rows:
                watches[0](row)
                watches[1](row | {"loss": 2 * row["loss"]})
    assert capsys.readouterr().out == ""  # stdout is for the result
    for run, times in zip(runs, (1, 2), strict=True):
        want = [(row["step"], times * row["loss"]) for row in ROWS]
        assert offline(run.folder, (run.folder / "log_id").read_text()) == (want, want)


def test_a_logger_that_cannot_start_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # has no login
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(
        ValueError, match="`log` must name loggers that can start. wandb: "
    ):
        with open_loggers(run, None):
            pass
