"""Commands in this process and in others, and data that a tiny model learns."""

import pathlib
import subprocess
import sys

import numpy as np
from tokenizer_helpers import write_rows

import qlora_jax as ql
from qlora_jax import cli
from qlora_jax.cli.main import main

ROOT = pathlib.Path(ql.__file__).parent.parent
PROGRAM = ["-m", "qlora_jax_program"]
ADAPTER = "adapter/adapter_model.safetensors"
SIGNS = "abcdefgh"


def run(capsys, *arguments):
    """Runs a command in this process: its status, what it prints, its errors."""
    capsys.readouterr()
    status = main([*map(str, arguments)])
    return status, *capsys.readouterr()


def run_python(*arguments, **others):
    """Runs Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=ROOT, **settings | others)


def start_python(*arguments, **others):
    """Starts Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, **others)


def write_letters(folder):
    """Writes prompts of two letters whose answer is the first one, twice."""
    for name, count, seed in (("train", 40, 0), ("valid", 6, 1)):
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            one, two = rng.choice([*SIGNS], 2)
            rows.append({"prompt": f"{one}{two}=", "completion": str(one) * 2})
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def settings(folder, data, out, **others):
    """Settings of a short run, of which some kernels are enough."""
    small = dict(steps=6, batch_size=4, max_length=16, lora_r=4, learning_rate=2e-2)
    small |= dict(save_every=2, dtype="float32", remat=False, chat=False)
    # A program of a step that is the same for any number of steps compiles once.
    small |= dict(schedule="constant", warmup=1)
    small |= dict(target_modules=["q_proj", "down_proj"])
    return cli.TrainConfig(str(folder), str(data), str(out), **(small | others))


def rows_of(out):
    """What a run wrote of each step."""
    return ql.train.read_metrics(pathlib.Path(out) / "metrics.jsonl")


def losses(out):
    return [row["loss"] for row in rows_of(out) if row["step"]]
