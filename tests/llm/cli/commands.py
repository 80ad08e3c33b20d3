"""Runs commands in this process or a child process; data that a tiny model learns."""

import pathlib
import subprocess
import sys

import numpy as np
from tokenizer_helpers import write_rows

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.train import read_metrics

ROOT = pathlib.Path(ql.__file__).parent.parent
PROGRAM = ["-m", "qlora_jax_program"]
ADAPTER = "adapter/adapter_model.safetensors"
SIGNS = "abcdefgh"


def run(capsys, *arguments):
    """Runs a command in this process; returns its status, stdout and stderr."""
    capsys.readouterr()
    status = main([*map(str, arguments)])
    return status, *capsys.readouterr()


def run_python(*arguments, **overrides):
    """Runs Python in a child process and waits for it."""
    command = [sys.executable, *map(str, arguments)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=ROOT, **settings | overrides)


def start_python(*arguments, **options):
    """Starts Python in a child process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **options)


def write_letters(folder):
    """Writes prompts of two letters, whose completion is the first letter twice."""
    for name, count, seed in (("train", 40, 0), ("valid", 6, 1)):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            first, second = rng.choice([*SIGNS], 2)
            rows.append({"prompt": f"{first}{second}=", "completion": str(first) * 2})
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def settings(folder, data, out, **overrides):
    """Returns the settings of a short run that trains two kinds of kernels."""
    defaults = dict(steps=6, batch_size=4, max_length=16, rank=4, learning_rate=2e-2)
    defaults |= dict(save_every=2, dtype="float32", remat=False, chat=False)
    # With a constant schedule the step does not depend on `steps`, so that all runs
    # share one compiled program.
    defaults |= dict(schedule="constant", warmup=1)
    defaults |= dict(target_modules=["q_proj", "down_proj"])
    defaults |= dict(model=str(folder), data=str(data), out=str(out))
    return app.TrainConfig.from_settings(defaults | overrides)


def rows_of(out):
    """Returns the rows of a run's metrics.jsonl."""
    return read_metrics(pathlib.Path(out) / "metrics.jsonl")


def losses(out):
    """Returns the training loss of each step."""
    return [row["loss"] for row in rows_of(out) if row["step"]]
