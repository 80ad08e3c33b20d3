"""Ctrl-C ends `qlora-jax` at any time, with status 130 and one line on stderr."""

import os
import pathlib
import pty
import random
import shutil
import signal
import subprocess
import termios
import time

import commands
import pytest
import yaml
from commands import PROGRAM, rows_of, run_python, settings, start_python

import qlora_jax as ql
import qlora_jax_program
from qlora_jax.llm import app
from qlora_jax.llm.app.commands import train as training
from qlora_jax.llm.models.tiny import save_tiny

INTERRUPTED, STATUS = "qlora-jax: interrupted\n", 128 + signal.SIGINT
SEED = int(os.environ.get("QLORA_JAX_SEED", 0))
TRIES = int(os.environ.get("QLORA_JAX_INTERRUPTS", 4))
# The program, which prints a line once Python has started and the handler is set.
CODE = """
import signal, qlora_jax_program
signal.signal(signal.SIGINT, qlora_jax_program.end)
print("begins", flush=True)
qlora_jax_program.process()
"""


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


def interrupt(command, seconds, file):
    """Sends SIGINT after some seconds; returns the status, the output and the errors.

    The output, which goes to a file, is read just before the signal.
    """
    with file.open("w") as target:
        pipes = dict(stdout=target, stderr=subprocess.PIPE)
        with start_python(*command, **pipes, text=True) as process:
            while "begins\n" not in file.read_text():
                time.sleep(0.001)
            time.sleep(seconds)
            out = file.read_text()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
    return process.returncode, out, err


# A program that loses all exceptions, as callbacks of JAX's C++ code do.
LOSES = """
class Lost:
    def __del__(self):
        sum(range(1000))

def run_program():
    while True:
        try:
            Lost()
        except BaseException:
            pass
"""


def test_an_interrupt_does_not_get_lost_in_callbacks(tmp_path):
    package = tmp_path / "qlora_jax" / "llm" / "cli"
    package.mkdir(parents=True)
    for path in (package, package.parent, package.parent.parent):
        (path / "__init__.py").touch()
    (package / "main.py").write_text(LOSES)
    shutil.copy(qlora_jax_program.__file__, tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{CODE}"
    draw = random.Random(SEED)
    for _ in range(8):
        command = ["-S", "-c", code]
        done = interrupt(command, draw.uniform(0.01, 0.1), tmp_path / "out.txt")
        assert done == (STATUS, "begins\n", INTERRUPTED)


@pytest.mark.parametrize(
    "number, line",
    [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, "qlora-jax: terminated\n")],
)
def test_a_signal_leaves_no_unfinished_file(number, line, tmp_path, monkeypatch, capfd):
    statuses, before = [], signal.getsignal(number)
    monkeypatch.setattr(qlora_jax_program.os, "_exit", statuses.append)
    monkeypatch.setattr(qlora_jax_program.os, "isatty", lambda number: False)
    with pytest.raises(FileNotFoundError), ql.io.new_path(tmp_path / "notes") as new:
        new.write_text("half")
        qlora_jax_program.end(number, None)
        assert not [*tmp_path.iterdir()]
    signal.signal(number, before)
    assert statuses == [128 + number] and capfd.readouterr().err == line


# Sends SIGTERM while a model is written.
TERMINATED = """
import os, signal, qlora_jax as ql
save = ql.io.save_merged

def save_and_end(out, *arguments, **options):
    with ql.io.new_path(out) as folder:
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


def check_ended(status, out, err, run):
    """Checks that stderr has one line, or two if a state was saved."""
    if status == 0 and out.replace("begins\n", ""):
        return  # it had finished before the signal
    assert status == STATUS, err
    assert "Traceback" not in err and "Exception" not in err
    if "the run stops after this step" in err:
        assert f"To resume: qlora-jax train --config {run}/config.yaml" in err
        assert [*(run / "state").iterdir()]
    else:
        assert err.endswith(INTERRUPTED) and err.count("interrupted") == 1


@pytest.mark.slow
def test_an_interrupt_at_any_time_ends_a_command(folder, data, tmp_path):
    file, few = tmp_path / "run.yaml", dict(steps=3, eval_examples=0)
    config = settings(folder, data, tmp_path / "run", **few)
    file.write_text(yaml.safe_dump(config.to_settings()))
    train = ["-c", CODE, "train", "--config", file]
    began = time.monotonic()
    assert run_python(*train, "--out", tmp_path / "all").returncode == 0
    lasts, draw = time.monotonic() - began, random.Random(SEED)
    run = "--run", tmp_path / "all"
    other_commands = [
        ["generate", "--model", folder, "--max-new-tokens=4", "--prompt", "a"],
        ["score", *run, "--data", data / "valid.jsonl"],
        ["export", *run, "--format", "merged", "--out"],
        ["inspect", tmp_path / "all"],
        ["check"],
        ["pairs", *run],
    ]
    for number in range(TRIES):
        out = tmp_path / f"run{number}"
        # Every second command is a training run.
        command = [*train, "--out"]
        if number % 2:
            command = ["-c", CODE, *other_commands[number // 2 % len(other_commands)]]
        if command[-1] == "--out":
            command.append(out)
        # More signals come early, while modules are imported.
        seconds = lasts * ((number + draw.random()) / TRIES) ** 2
        done = interrupt(command, seconds, tmp_path / "out.txt")
        print(f"{command[2]}, {seconds:.2f} of {lasts:.2f} s: {done}")
        check_ended(*done, out)


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
