"""`qlora-jax train`: what a run computes, leaves, refuses and survives."""

import json

import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import cli
from qlora_jax.models.tiny import save_tiny


def write_rows(path, count, seed, length=12):
    """Sequences that count up by one, which a tiny model can learn."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 256 - length, count)
    rows = [{"input_ids": list(range(int(s), int(s) + length))} for s in starts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    write_rows(data / "train.jsonl", 40, 0)
    write_rows(data / "valid.jsonl", 6, 1)
    return data


def settings(folder, data, out, **others):
    small = dict(steps=6, batch_size=4, max_length=16, lora_r=4, learning_rate=2e-2)
    small |= dict(save_every=2, eval_every=3, dtype="float32", remat=False)
    return cli.TrainConfig(str(folder), str(data), str(out), **(small | others))


def test_a_run_leaves_an_adapter_metrics_plot_and_settings(folder, data, tmp_path):
    out = tmp_path / "run"
    result = cli.train(settings(folder, data, out))
    rows = ql.train.read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "valid_loss" in row] == [0, 3, 6]
    assert result.valid_loss == rows[-1]["valid_loss"] < rows[0]["valid_loss"] - 0.5
    print(sorted(p.name for p in out.iterdir()))
    # The adapter gives the same loss to the command that scores.
    score = cli.score(
        cli.ScoreConfig(str(folder), str(data / "valid.jsonl"), result.adapter)
    )
    assert result.valid_loss == pytest.approx(score.loss, abs=0.2)
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter",
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "result.json",
        "state",
    ]
