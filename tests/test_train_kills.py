"""A run that is killed at random moments goes on as if it had not been.

QLORA_JAX_KILLS=20 pytest tests/test_train_kills.py -s
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

import qlora_jax as ql
from qlora_jax.models.tiny import save_tiny

KILLS = int(os.environ.get("QLORA_JAX_KILLS", "2"))
STEPS = 12 * max(KILLS, 2)
ROOT = pathlib.Path(ql.__file__).parent.parent


def start(config, out, resume):
    command = [sys.executable, "-m", "qlora_jax.cli.main", "train", "--json"]
    command += ["--config", str(config), "--out", str(out), *["--resume"] * resume]
    log = (out.parent / f"{out.name}.log").open("ab")
    with log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def kill_at_random(process, out, rng):
    """Kills the process while it trains, every second time while it saves."""
    metrics, state = out / "metrics.jsonl", out / "state"
    size = lambda: metrics.stat().st_size if metrics.exists() else 0
    is_saving = lambda: any(state.glob("*.orbax-checkpoint-tmp"))
    before = size()
    while process.poll() is None and size() <= before:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    what = "training"
    if rng.random() < 0.5:
        until = time.monotonic() + 5
        while process.poll() is None and not is_saving() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        what = "saving"
    process.kill()
    return process.wait(), what if not is_saving() else f"{what}, a state half-written"


def arrays(out):
    with ocp.CheckpointManager(out / "state") as manager:
        assert manager.latest_step() == STEPS
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(STEPS, args=args)["state"]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_parameters_of_an_uninterrupted_one(tmp_path):
    rng = random.Random(0)
    draw = np.random.default_rng(0)
    rows = [{"input_ids": draw.integers(0, 250, n).tolist()} for n in range(3, 60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    settings = dict(model=save_tiny(tmp_path / "base"), data=str(data), steps=STEPS)
    settings |= dict(batch_size=2, accumulation=2, packing=True, max_length=64)
    settings |= dict(lora_r=4, lora_dropout=0.1, save_every=3, keep=2, seed=3)
    config.write_text(yaml.safe_dump(settings))
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(config, one, False).wait() == 0, (tmp_path / "one.log").read_text()
    for _ in range(KILLS):
        process = start(config, two, (two / "config.yaml").exists())
        status, what = kill_at_random(process, two, rng)
        rows = len(ql.train.read_metrics(two / "metrics.jsonl"))
        print(f"killed after {rows} steps of {STEPS}, while {what}: {status}")
        assert status == -9, (tmp_path / "two.log").read_text()
    assert start(config, two, True).wait() == 0, (tmp_path / "two.log").read_text()
    found, wanted = arrays(two), arrays(one)
    assert found.keys() == wanted.keys() and len(found) > 40
    for name, x in wanted.items():
        np.testing.assert_array_equal(found[name], x, name)
    file = "adapter/adapter_model.safetensors"
    assert (one / file).read_bytes() == (two / file).read_bytes()
    numbers = lambda out: [
        (row["step"], row["loss"], row["grad_norm"])
        for row in ql.train.read_metrics(out / "metrics.jsonl")
    ]
    assert numbers(two) == numbers(one)
    assert [step for step, *_ in numbers(two)] == list(range(1, STEPS + 1))
    assert not list((two / "state").glob("*tmp*"))
