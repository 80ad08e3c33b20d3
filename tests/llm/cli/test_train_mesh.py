"""`qlora-jax train --mesh`: on many devices, and in two processes."""

import itertools
import json
import signal
import socket
import time

import commands
import jax
import pytest
import yaml
from commands import ADAPTER, PROGRAM, losses, rows_of, write_letters
from stored import tensors_of
from tokenizer_helpers import write_rows
from tolerances import assert_close

from qlora_jax.llm import app
from qlora_jax.llm.app.commands import train as training
from qlora_jax.llm.app.train_config import parse_mesh
from qlora_jax.llm.models.tiny import save_tiny

SIZES = dict(hidden_size=128, intermediate_size=256, vocab_size=260)
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return save_tiny(folder, **SIZES, **HEADS, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("data"))


def settings(folder, data, out, **overrides):
    """Targets are split by columns and by rows; test_mesh.py trains all kernels."""
    defaults = dict(batch_size=8, save_every=3, optimizer="adamw", warmup=0, remat=True)
    defaults |= dict(fmt="nvfp4")  # whose blocks are of 16
    return commands.settings(folder, data, out, **(defaults | overrides))


def test_meshes_are_written_in_two_forms():
    for mesh in ("tensor=2, fsdp=4", {"fsdp": 4, "tensor": 2}):
        assert [*parse_mesh(mesh).items()] == [("fsdp", 4), ("tensor", 2)]
    assert parse_mesh(None) == {}


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(
    folder, data, tmp_path, monkeypatch, free_programs
):
    """A run on 8 devices, then 1, then 8 with another split, equals one on 1 device.

    In the last part the optimizer state is in host memory.
    """
    write_results, final_states = training.write_results, []

    def record_state(run, base, teacher, state, best_metrics):
        final_states.append(state)
        return write_results(run, base, teacher, state, best_metrics)

    monkeypatch.setattr(training, "write_results", record_state)
    free_programs()
    single = app.train(settings(folder, data, tmp_path / "one", steps=7))
    paged = dict(optimizer="adamw", offload_optimizer=True)
    changes = [
        dict(mesh="fsdp=2,tensor=4", steps=1),
        dict(steps=2, resume=True),
        dict(mesh="fsdp=4,tensor=2", steps=7, resume=True, **paged),
    ]
    for change in changes:
        free_programs()  # each mesh compiles its own large programs
        meshed = app.train(settings(folder, data, tmp_path / "two", **change))
    lora, (_, (adam, *_)) = final_states[-1].lora, final_states[-1].opt_state
    for moments in (adam.mu, adam.nu):
        for x, y in zip(*map(jax.tree.leaves, (moments, lora)), strict=True):
            on_host = y.sharding.with_memory_kind("pinned_host")
            assert x.sharding.memory_kind == on_host.memory_kind
            assert x.sharding.is_equivalent_to(on_host, x.ndim)
            assert not x.sharding.is_fully_replicated
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))
    adapter, expected_adapter = (
        tensors_of(tmp_path / x / "adapter") for x in ("two", "one")
    )
    assert (
        adapter.keys() == expected_adapter.keys() and len(expected_adapter) == 2 * 2 * 2
    )
    for name, x in expected_adapter.items():
        # Adam divides each entry of a gradient by its size. The smallest of n entries
        # is about n times smaller than the others, and all are rounded by the bound of
        # 64 terms of the usual one at most: n times that in an entry of a step is
        # sqrt(n) times that in the norm. There are 7 steps.
        assert_close(adapter[name], x, terms=7**2 * x.size * 64)
    assert_close(meshed.valid_loss, single.valid_loss)
    assert (meshed.exact_before, meshed.exact_after) == (
        single.exact_before,
        single.exact_after,
    )
    answers = [(tmp_path / run / "answers.jsonl").read_text() for run in ("one", "two")]
    assert answers[0] == answers[1]


STEPS = 40


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# JAX's own handler of SIGTERM would let the process continue.
SIGNAL = """
import os, signal, sys, time
from qlora_jax.llm.app import TrainConfig
from qlora_jax.llm.app.processes import start_distributed
options = dict(mesh="fsdp=1", distributed=f"{sys.argv[1]},1,0")
start_distributed(TrainConfig("m", "d", "o", **options))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_a_process_of_several():
    done = commands.run_python("-c", SIGNAL, f"localhost:{free_port()}", timeout=60)
    assert done.returncode == -signal.SIGTERM


def start_two(config, out, resume=False):
    """Starts two processes of one run, of one device each."""
    arguments = ["--config", config, "--out", out, "--mesh=fsdp=2"]
    address = f"localhost:{free_port()}"
    command, processes = [*PROGRAM, "train", *arguments, *["--resume"] * resume], []
    for rank in range(2):
        with (out.parent / f"{out.name}.{rank}.log").open("ab") as log:
            place = f"--distributed={address},2,{rank}"
            process = commands.start_python(*command, place, stdout=log, stderr=log)
            processes.append(process)
    return processes


def wait_for_two(processes, out):
    for rank, process in enumerate(processes):
        log = out.parent / f"{out.name}.{rank}.log"
        assert process.wait(600) == 0, log.read_text()[-3000:]


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_kill_and_a_signal(
    folder, data, tmp_path
):
    single, distributed, killed = (tmp_path / name for name in ("one", "two", "killed"))
    (data / "valid.jsonl").rename(data / "unused.jsonl")
    options = dict(steps=STEPS, save_every=10, learning_rate=2e-3)
    config = settings(folder, data, single, **options)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_settings()))
    wait_for_two(start_two(file, distributed), distributed)
    app.train(config)
    assert_close(losses(distributed), losses(single))
    # Only process 0 prints and writes.
    assert f"step 40 of {STEPS}: loss" in (tmp_path / "two.0.log").read_text()
    log = (tmp_path / "two.1.log").read_text()
    assert "loss" not in log
    names = ["adapter", "config.yaml", "loss.png", "metrics.jsonl", "result.json"]
    assert sorted(path.name for path in distributed.iterdir()) == [*names, "state"]

    processes = start_two(file, killed)
    while not (killed / "state" / "10").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    processes[1].kill()
    assert processes[0].wait(120) != 0
    assert processes[1].wait() == -signal.SIGKILL
    assert len(losses(killed)) < STEPS
    # A signal to one process ends both after the same step.
    num_steps = len(losses(killed))
    processes = start_two(file, killed, resume=True)
    log = tmp_path / "killed.0.log"
    while (
        "Resuming after step" not in log.read_text() or len(losses(killed)) == num_steps
    ):
        assert all(process.poll() is None for process in processes), log.read_text()
        num_steps = min(num_steps, len(losses(killed)))
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        assert process.wait(120) == 128 + signal.SIGTERM, log.read_text()
    step = len(losses(killed))
    assert step < STEPS and f"The state of step {step} is saved in" in log.read_text()
    assert "config.yaml --resume" not in (tmp_path / "killed.1.log").read_text()
    wait_for_two(start_two(file, killed, resume=True), killed)
    assert losses(killed) == losses(distributed)
    assert (killed / ADAPTER).read_bytes() == (distributed / ADAPTER).read_bytes()


@pytest.mark.slow
def test_two_processes_compare_preferences_as_one(folder, tmp_path):
    rows = [
        {"prompt": f"{a}{b}=", "chosen": a, "rejected": a + b}
        for a, b in itertools.permutations("abcd", 2)
    ]
    for name in ("train", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    single, distributed = tmp_path / "one", tmp_path / "two"
    options = dict(objective="dpo", learning_rate=2e-2)
    options |= dict(steps=4, save_every=2, eval_every=2, eval_examples=0)
    config = settings(folder, tmp_path, single, **options, keep_best=True)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_settings()))
    wait_for_two(start_two(file, distributed), distributed)
    expected = app.train(config)
    result = json.loads((distributed / "result.json").read_text())
    assert result["best_step"] == expected.best_step
    for row, distributed_row in zip(rows_of(single), rows_of(distributed), strict=True):
        # At first all pairs are ties, so rounding decides what is accurate.
        unequal = [key for key in row if key.endswith("accuracies")]
        for key in {*row} - {"seconds", "tokens_per_s", *unequal}:
            # Rewards are differences of log probabilities, which are above 1.
            magnitude = max(1.0, abs(row[key]))
            assert_close(distributed_row[key], row[key], magnitude=magnitude)
    assert sorted(x.name for x in (distributed / "state").iterdir()) == ["2", "4"]
