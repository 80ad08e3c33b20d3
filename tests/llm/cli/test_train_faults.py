"""A run with faults at random moments ends with the same bits as one without.

It is killed, sent SIGTERM, stopped by a NaN, and finds its disk full. Its optimizer
state is in host memory. The long form of the test:
QLORA_JAX_STEPS=500 QLORA_JAX_KILLS=10 pytest tests/llm/cli/test_train_faults.py -s
"""

import contextlib
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from commands import ROOT, start_python
from helpers import assert_same_bits
from tokenizer_helpers import write_rows

from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.train import read_metrics

KILLS = int(os.environ.get("QLORA_JAX_KILLS", "1"))
STEPS = int(os.environ.get("QLORA_JAX_STEPS", "36"))
NAN_STEP = STEPS // 2
SAVE_EVERY = 3
DISK = 16_384  # KiB
ROOM = 100  # KiB that are left where the disk is full: less than a state takes


def main(config, out, resume, on_nan):
    """Trains as `qlora-jax train` does, on a base that is NaN in one step.

    Writes the resident memory after each step.
    """
    import jax

    from qlora_jax.llm import app
    from qlora_jax.llm.app.training import program

    make_step = program.make_step

    def to_nan(x):
        return x * np.nan if x.dtype == np.float32 else x

    sizes = pathlib.Path(f"{out}.rss").open("a")

    def make_faulty_step(*args):
        step = make_step(*args)

        def run(state, base, batches):
            number = int(state.step) + 1
            is_bad = number == NAN_STEP
            results = step(
                state, jax.tree.map(to_nan, base) if is_bad else base, batches
            )
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            size = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            print(number, os.getpid(), round(size, 2), file=sizes, flush=True)
            return results

        return run

    program.make_step = make_faulty_step
    settings = yaml.safe_load(pathlib.Path(config).read_text())
    settings |= dict(out=out, resume=resume, on_nan=on_nan)
    app.train(app.TrainConfig.from_settings(settings))


def start(config, out, on_nan="skip"):
    resume = (out / "config.yaml").exists()
    arguments = __file__, config, out, int(resume), on_nan
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    # Threads that wait for each other make glibc take more memory, not the run.
    env["MALLOC_ARENA_MAX"] = "1"
    with (config.parent / f"{out.name}.log").open("ab") as log:
        return start_python(*arguments, env=env, stdout=log, stderr=log)


def log_of(config, out):
    return (config.parent / f"{out.name}.log").read_text()


def rows_of(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(step, process, out, rng):
    """Kills the process after a step, in half of the cases while it saves."""
    state = out / "state"

    def is_saving():
        return any(state.glob("*.orbax-checkpoint-tmp"))

    while process.poll() is None and rows_of(out) < step:
        time.sleep(0.005)
    activity = "training"
    if rng.random() < 0.5:
        deadline = time.monotonic() + 5
        while (
            process.poll() is None and not is_saving() and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        activity = "saving"
    process.kill()
    status = process.wait()
    return status, activity + ", a state half-written" * is_saving()


def kill_some(count, span, config, out, rng):
    for _ in range(count):
        process = start(config, out)
        step = min(rows_of(out) + rng.randint(1, span), STEPS - 3)
        status, activity = kill_at(step, process, out, rng)
        print(f"killed after step {rows_of(out)} of {STEPS}, while {activity}")
        assert status == -9, log_of(config, out)


@contextlib.contextmanager
def small_disk(folder):
    """Makes a folder on a small disk where we may mount one (as root, on Linux).

    Elsewhere the size of each file that this process writes is limited. Yields the
    error message that a failed write contains.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}k", "tmpfs", folder]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "No space left on device"
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM * 1024, before[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def full_disk(folder, is_mounted):
    """A disk with room for metrics but not for a state."""
    if not is_mounted:  # The size of files is limited instead.
        yield
        return
    ballast = folder / "ballast"
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    ballast.write_bytes(bytes(free - ROOM * 1024))
    try:
        yield
    finally:
        ballast.unlink()


def arrays_of(out):
    """Returns the arrays of the last state of a run."""
    with ocp.CheckpointManager(out / "state") as manager:
        assert manager.latest_step() == STEPS
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(STEPS, args=args)["state"]


def states_of(out):
    """Returns the steps of complete states, in order."""
    names = [path.name for path in (out / "state").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


def write_config(folder):
    draw = np.random.default_rng(0)
    rows = [{"input_ids": draw.integers(0, 250, n).tolist()} for n in range(3, 60)]
    data = write_rows(folder / "rows.jsonl", rows)
    sizes = dict(hidden_size=128, intermediate_size=128)
    settings = dict(model=save_tiny(folder / "base", **sizes), data=str(data))
    settings |= dict(batch_size=2, accumulation=2, packing=True, max_length=64)
    settings |= dict(rank=32, lora_dropout=0.1, seed=3, steps=STEPS)
    settings |= dict(optimizer="adamw", offload_optimizer=True)
    settings |= dict(target_modules=["q_proj", "up_proj", "down_proj"])
    settings |= dict(save_every=SAVE_EVERY)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.mark.slow
def test_a_run_with_faults_ends_with_the_bits_of_one_without(tmp_path):
    rng = random.Random(0)
    config, undisturbed = write_config(tmp_path), tmp_path / "one"
    assert start(config, undisturbed).wait() == 0, log_of(config, undisturbed)
    with small_disk(tmp_path / "disk") as reason:
        disturbed = tmp_path / "disk" / "two"
        is_mounted = "space" in reason
        kills_before_nan = (KILLS + 1) // 2
        span = NAN_STEP // (kills_before_nan + 2)  # few enough that none passes the NaN
        kill_some(kills_before_nan, span, config, disturbed, rng)
        stop_by_signal(config, disturbed)
        stop_at_nan(config, disturbed)
        run_on_a_full_disk(config, disturbed, is_mounted, reason)
        kill_some(KILLS - kills_before_nan, span, config, disturbed, rng)
        assert start(config, disturbed).wait() == 0, log_of(config, disturbed)
        check_same(disturbed, undisturbed)
    check_memory(pathlib.Path(f"{undisturbed}.rss"))


def stop_by_signal(config, out):
    """After SIGTERM the run saves the state of its current step."""
    process, sizes = start(config, out), pathlib.Path(f"{out}.rss")
    while process.poll() is None and f" {process.pid} " not in sizes.read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, log_of(config, out)
    assert states_of(out)[-1] == rows_of(out) < NAN_STEP
    print(f"sent SIGTERM, ended after step {rows_of(out)}")


def stop_at_nan(config, out):
    """Without `on_nan: skip` the run stops, and names the step."""
    assert rows_of(out) < NAN_STEP
    assert start(config, out, "stop").wait() == 1
    assert f"step {NAN_STEP} has loss nan" in log_of(config, out)
    assert rows_of(out) == NAN_STEP
    assert NAN_STEP - SAVE_EVERY <= states_of(out)[-1] < NAN_STEP
    print(f"stopped at the NaN of step {NAN_STEP}")


def run_on_a_full_disk(config, out, is_mounted, reason):
    """With a full disk the run stops, and keeps its last state."""
    before = states_of(out)
    with full_disk(out.parent, is_mounted):
        assert start(config, out).wait() == 1
    # A state is written in the background, so a row of metrics may meet the full disk
    # before the run sees that the state has.
    log = log_of(config, out)
    is_state = f"{reason}. The last checkpoint is that of step {before[-1]}" in log
    assert is_state or re.search(f"metrics.jsonl cannot be written: .*{reason}", log)
    assert states_of(out)[-1] == before[-1]
    print(f"stopped at a full disk after the state of step {before[-1]}")


def check_same(disturbed, undisturbed):
    state, expected = arrays_of(disturbed), arrays_of(undisturbed)
    assert_same_bits(state, expected)
    # A and B of three kernels, with two moments for each; two counts, the key, the step
    # and the steps that were skipped.
    assert len(state) == 3 * 2 * (1 + 2) + 5
    assert int(expected["skipped"]) == 1
    file = "adapter/adapter_model.safetensors"
    assert (undisturbed / file).read_bytes() == (disturbed / file).read_bytes()

    def numbers_of(out):
        return [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_metrics(out / "metrics.jsonl")
        ]

    assert numbers_of(disturbed) == numbers_of(undisturbed)
    assert [step for step, *_ in numbers_of(disturbed)] == list(range(1, STEPS + 1))
    assert not list((disturbed / "state").glob("*tmp*"))


def check_memory(path):
    """Resident memory is flat from a tenth of the steps on, or from the tenth step.

    The allowed growth per step is 2% over the steps from the first tenth to the last.
    """
    lines = [line.split() for line in path.read_text().splitlines()]
    sizes = np.array([float(size) for _, _, size in lines])
    assert len(sizes) == STEPS
    # Programs and the first saves are in memory by the ninth step.
    window, first = STEPS // 10, max(STEPS // 10, 9)
    for step in (first, STEPS // 2, STEPS):
        print(f"{sizes[step - 1]:.1f} MiB resident at step {step}")
    begin, end = np.median(sizes[first:][:window]), np.median(sizes[-window:])
    allowed = 0.02 * (STEPS - first - window) / (STEPS - 2 * window)
    assert end < (1 + allowed) * begin


if __name__ == "__main__":
    config, out, resume, on_nan = sys.argv[1:]
    main(config, out, bool(int(resume)), on_nan)
