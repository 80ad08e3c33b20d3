"""Broken files give one line with the name of the file; killed commands start again."""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import shutil
import signal

import numpy as np
import pytest
import yaml
from commands import run, run_python, settings, write_letters
from hostile_files import change_json, commands_on, make_model
from safetensors.numpy import load_file, save_file
from tokenizer_helpers import write_rows

import qlora_jax as ql
from qlora_jax.io.files import new_path
from qlora_jax.llm import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models of the same shapes, data, and a run on each."""
    folder = tmp_path_factory.mktemp("broken")
    data = write_letters(folder)
    for seed, name in enumerate(("run", "other")):
        model = make_model(folder / f"base-{name}", seed=seed)
        few = dict(eval_examples=0, steps=4)
        app.train(settings(model, data / "train.jsonl", folder / name, **few))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the first run, which a test may break."""
    return shutil.copytree(folder / "run", tmp_path / "run")


def check_refused(capsys, arguments, *words):
    """Checks that a command ends with one line that has all words, and returns it."""
    status, _, err = run(capsys, *arguments)
    assert status == 1, err
    notes = "weights: ", "note: ", "warning: ", "the run", "Resuming ", "40 rows "
    lines = [x for x in err.splitlines() if x and not x.startswith(notes)]
    assert len(lines) == 1 and all(str(word) in lines[0] for word in words), err
    return lines[0]


METRICS = {
    "no step": b"{}\n",
    "text": b"text\n",
    "list": b"[1]\n",
    "latin": '{"step": 1, "loss": "é"}\n'.encode("latin-1"),
    "utf-16": '{"step": 1}\n'.encode("utf-16"),
    "a text": b'{"step": 1, "loss": "small"}\n',
}


@pytest.mark.parametrize("content", METRICS.values(), ids=METRICS)
def test_metrics(copy, capsys, content):
    file = copy / "metrics.jsonl"
    file.write_bytes(content)
    check_refused(capsys, resume(copy), file)


def resume(run, *arguments):
    return ["train", "--config", run / "config.yaml", "--out", run, "--resume"] + [
        *arguments
    ]


@pytest.mark.slow
def test_metrics_of_a_resumed_run(copy, capsys):
    file = copy / "metrics.jsonl"
    file.write_bytes(METRICS["no step"])
    check_refused(capsys, resume(copy), file)


def change_state(state, **changes):
    """Changes what is saved beside a state."""
    file = state / "about" / "metadata"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: x for k, x in values.items() if x is not None}))


@pytest.mark.slow
@pytest.mark.parametrize("key", ["settings", "position"])
def test_a_state_that_lacks_a_key(copy, capsys, key):
    change_state(copy / "state" / "4", **{key: None})
    check_refused(capsys, resume(copy), copy / "state" / "4", key)


@pytest.mark.slow
def test_a_state_of_another_model(copy, folder, tmp_path, capsys):
    shutil.rmtree(copy / "state")
    shutil.copytree(folder / "other" / "state", copy / "state")
    export = ["export", "--run", copy, "--out", tmp_path / "adapter"]
    check_refused(capsys, export, copy / "state" / "4", "`model`", folder / "base-run")
    # Whoever names the model has chosen it.
    assert run(capsys, *export, "--model", folder / "base-other")[0] == 0


# Tokenizers whose files are read by code in Rust, which panics: at once, or at a text.
TOKENIZERS = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "X", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {},
        }
    },
    "unknown": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["z", -1.0]]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_that_fail(tmp_path, capsys, changes):
    model = make_model(tmp_path / "model")
    change_json(model / "tokenizer.json", **changes)
    change_json(
        model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    )
    commands = commands_on(model, tmp_path)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "in"}])
    generate = [*commands["generate"], "--chat=false"]
    for arguments in (generate, [*commands["score"], "--data", texts]):
        check_refused(capsys, arguments, model, "tokenizer")


@pytest.mark.parametrize("value", [[], {}, None])
def test_model_types(tmp_path, capsys, value):
    model = make_model(tmp_path / "model")
    change_json(model / "config.json", model_type=value)
    commands = commands_on(model, tmp_path)
    for name in ("generate", "score", "preview", "merged", "gguf"):
        check_refused(capsys, commands[name], model / "config.json", "model_type")


def test_deep_yaml(copy, tmp_path, capsys):
    file = tmp_path / "deep.yaml"
    file.write_text("model: " + "[" * 100_000)
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "train", "--config", file)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{file}" in err.splitlines()[0]
    shutil.copy(file, copy / "config.yaml")
    check_refused(capsys, ["export", "--run", copy], copy / "config.yaml")


@contextlib.contextmanager
def small_disk(max_bytes):
    """Lets this process write only so many bytes to each file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged", "gguf"])
def test_a_full_disk(tmp_path, capsys, name):
    commands = commands_on(make_model(tmp_path / "model"), tmp_path)
    *_, out = commands[name]
    with small_disk(20_000):
        line = check_refused(capsys, commands[name], out)
    assert "disk" in line or "File too large" in line
    assert {x.name for x in tmp_path.iterdir()} == {"model", "rows.jsonl"}


@pytest.mark.parametrize("kind", ["folder", "broken link"])
def test_validation_rows_that_are_no_file(tmp_path, capsys, kind):
    model, data = make_model(tmp_path / "model"), tmp_path / "data"
    data.mkdir()
    write_letters(data)
    (valid := data / "valid.jsonl").unlink()
    if kind == "folder":
        valid.mkdir()
    else:
        valid.symlink_to(tmp_path / "missing")
    train = ["train", "--model", model, "--data", data, "--out", tmp_path / "run"]
    check_refused(capsys, train, valid)


@pytest.mark.slow
def test_a_huge_weight_is_no_matter_of_the_learning_rate(folder, tmp_path, capsys):
    model = shutil.copytree(folder / "base-run", tmp_path / "model")
    file, name = model / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(file)
    tensors[name][3] = 3e38  # finite, but not its products
    save_file(tensors, file)
    config = settings(model, folder / "train.jsonl", tmp_path / "run", fmt="none")
    with pytest.raises(FloatingPointError, match="step 1 ") as raised:
        app.train(config)
    assert "other rows or weights" in str(raised.value)


def test_unfinished_files_of_killed_processes_are_deleted(tmp_path):
    path = tmp_path / "notes"
    with new_path(path) as new:
        temporary = new.parent
        prefix = temporary.name[:-8]  # the rest is random
        new.write_text("new")
    stale, used, mine = (tmp_path / f"{prefix}{x * 8}" for x in "abc")
    for leftover in (stale, used):
        leftover.mkdir()
        (leftover / "new").write_text("half")
    mine.mkdir()
    (mine / "thesis").write_text("whole")  # not from this library
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a process that is writing
    with new_path(path) as new:
        new.write_text("newer")
    os.close(descriptor)
    assert {x.name for x in tmp_path.iterdir()} == {"notes", used.name, mine.name}
    # If the process ended between the two renames of a folder, the old one is back.
    (stale / "old").mkdir(parents=True)
    (stale / "new").mkdir()
    with pytest.raises(RuntimeError), new_path(tmp_path / "notes"):
        raise RuntimeError
    path.unlink()
    with pytest.raises(RuntimeError), new_path(path):
        raise RuntimeError


KILLED = """
import os, pathlib, signal, sys
from qlora_jax.io.files import new_path
with new_path(sys.argv[1]) as new:
    new.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_after_the_next_one(tmp_path):
    done = run_python("-c", KILLED, tmp_path / "notes")
    assert done.returncode == -signal.SIGKILL and len([*tmp_path.iterdir()]) == 1
    with new_path(tmp_path / "notes") as new:
        new.write_text("whole")
    assert [x.name for x in tmp_path.iterdir()] == ["notes"]


@pytest.mark.slow
def test_a_run_that_trained_nothing_starts_again(folder, tmp_path, capsys):
    out, data = tmp_path / "run", folder / "train.jsonl"
    model = shutil.copytree(folder / "base-run", tmp_path / "model")
    file, name = model / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(file)
    right = tensors[name][3, 5]
    tensors[name][3, 5] = np.nan
    save_file(tensors, file)
    config = settings(model, data, out, fmt="nf4", eval_examples=0, steps=4)
    with pytest.raises(ValueError, match="down_proj"):
        app.train(config)
    assert (out / "config.yaml").exists()
    # While it wrote its settings, the process was killed.
    leftover = out / ".config.yaml.unfinished-abcdefgh"
    leftover.mkdir()
    (out / "config.yaml").rename(leftover / "new")
    tensors[name][3, 5] = right
    save_file(tensors, file)
    assert app.train(config).steps == 4
    assert not leftover.exists()
    with pytest.raises(ValueError, match="`out` must be new or empty"):
        app.train(config)


def test_files_of_others_are_not_overwritten(folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("# my settings\nmodel: mine\n")
    config = settings(folder / "base-run", folder / "train.jsonl", out)
    with pytest.raises(ValueError, match="`out` must be new or empty"):
        app.train(config)


WINDOWS = """
import sys
sys.modules |= {"fcntl": None, "resource": None}  # which Windows does not have
import qlora_jax_program
qlora_jax_program.process()
"""


@pytest.mark.slow
def test_train_without_modules_of_unix(folder, tmp_path):
    config = settings(
        folder / "base-run", folder / "train.jsonl", tmp_path / "run", steps=2
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_settings()))
    done = run_python("-c", WINDOWS, "train", "--config", file)
    assert done.returncode == 0, done.stderr


def test_the_temporary_names_of_orbax_are_its_own_constant():
    package = pathlib.Path(ql.__file__).parent
    texts = {file: file.read_text("utf-8") for file in package.rglob("*.py")}
    assert not [file for file, text in texts.items() if ".orbax-checkpoint" in text]
