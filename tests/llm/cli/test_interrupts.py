"""Ctrl-C ends `qlora-jax` at any time, with status 130 and one line on stderr."""

import os
import pathlib
import pty
import signal
import subprocess
import termios

import commands
import pytest
from commands import PROGRAM, rows_of, run_python, settings, start_python

from qlora_jax.llm import app
from qlora_jax.llm.app.commands import train as training
from qlora_jax.llm.models.tiny import save_tiny

INTERRUPTED, STATUS = "qlora-jax: interrupted\n", 128 + signal.SIGINT


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT raises KeyboardInterrupt here and in child processes.

    Background jobs of a shell would ignore it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return commands.write_letters(tmp_path_factory.mktemp("data"))


# Sends SIGTERM while a model is written.
TERMINATED = """
import os, signal, qlora_jax as ql
from qlora_jax.io.files import new_path
save = ql.io.save_merged

def save_and_end(out, *arguments, **options):
    with new_path(out) as folder:
        save(folder, *arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

ql.io.save_merged = save_and_end
import qlora_jax_program
qlora_jax_program.process()
"""


@pytest.mark.slow
def test_sigterm_ends_an_export_without_its_folder(folder, tmp_path):
    arguments = "export", "--model", folder, "--format", "merged", "--out"
    done = run_python("-c", TERMINATED, *arguments, tmp_path / "merged")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.endswith("qlora-jax: terminated\n")
    assert not [*tmp_path.iterdir()]


# Sends SIGINT when the command begins.
INTERRUPTING = """
import os, signal
from qlora_jax.llm import app

def interrupt(config):
    os.kill(os.getpid(), signal.SIGINT)

app.score = interrupt
import qlora_jax_program
qlora_jax_program.process()
"""


@pytest.mark.slow
def test_an_interrupt_ends_a_command(folder, data):
    arguments = "score", "--model", folder, "--data", data / "valid.jsonl"
    done = run_python("-c", INTERRUPTING, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (STATUS, "", INTERRUPTED)


@pytest.mark.slow
def test_a_signal_after_the_last_step_ends_the_run(
    folder, data, tmp_path, monkeypatch, capsys
):
    few = dict(steps=2, eval_examples=0)
    config = settings(folder, data / "train.jsonl", tmp_path / "run", **few)
    fit = training.fit

    def fit_and_signal(*arguments, **options):
        state = fit(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        return state

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", fit_and_signal)
        app.train(config)
    assert (
        f"The state of step 2 is saved in {config.out}/state" in capsys.readouterr().err
    )
    file = pathlib.Path(config.out) / "config.yaml"
    status, _, error = commands.run(capsys, "train", "--config", file, "--resume")
    assert status == 0, error
    assert [row["step"] for row in rows_of(config.out)] == [1, 2]


@pytest.mark.slow
def test_an_interrupt_ends_an_answer_and_then_a_conversation(folder):
    ours, theirs = pty.openpty()
    before, pipe = termios.tcgetattr(theirs), subprocess.PIPE
    command = [*PROGRAM, "generate", "--model", folder, "--max-new-tokens=10000"]

    def read_mark():
        error = b""
        while not error.endswith(b">>> "):
            error += process.stderr.read(1)

    with start_python(*command, stdin=theirs, stdout=pipe, stderr=pipe) as process:
        read_mark()
        os.write(ours, b"one\n")
        process.stdout.read(1)  # the answer begins
        process.send_signal(signal.SIGINT)
        read_mark()
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == STATUS and error.decode() == INTERRUPTED
    assert termios.tcgetattr(theirs) == before
    for end in (ours, theirs):
        os.close(end)
