"""Errors of wrong option values name the option, in words and on a few lines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored import draw_peft
from tokenizer_helpers import write_rows

from qlora_jax.llm import app
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.models.tiny import save_tiny

MODULES = {f"model.layers.{i}.mlp.down_proj": (64, 128) for i in range(2)}
SURROGATE = "\ud800 x"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, an adapter, rows, and a folder that is not a run."""
    folder = tmp_path_factory.mktemp("wrong")
    save_tiny(folder / "base")
    draw_peft(folder / "adapter", MODULES, target_modules=[*MODULES])
    write_rows(folder / "rows.jsonl", [{"text": "five"}])
    for name, key in (("surrogate", "text"), ("prompts", "prompt")):
        write_rows(folder / f"{name}.jsonl", [{key: "five"}, {key: SURROGATE}])
    pair = {"prompt": "p", "chosen": "a" * 20, "rejected": "b" * 20}
    write_rows(folder / "pairs.jsonl", [pair])
    (folder / "pairs").mkdir()
    write_rows(
        folder / "pairs" / "train.jsonl",
        [{"prompt": "p", "chosen": "a", "rejected": "b"}],
    )
    write_rows(folder / "pairs" / "valid.jsonl", [pair])
    wrapped = {"data": [{"text": "five"}, {"text": "six"}]}
    (folder / "wrapped.json").write_text(json.dumps(wrapped, indent=1))
    (folder / "one_line.json").write_text(json.dumps(wrapped))
    (folder / "list.yaml").write_text("- a\n")
    (folder / "wrong.yaml").write_text("fmt: nf5\n")
    (folder / "twice.yaml").write_text("rank: 4\nrank: 8\n")
    (folder / "no_run").mkdir()
    (folder / "no_run" / "notes.txt").write_text("mine")
    return folder


BASE, ROWS = ["--model", "base"], ["--data", "rows.jsonl"]
OUT = ["--out", "new"]
TRAIN, SCORE = ["train", *BASE, *ROWS, *OUT], ["score", *BASE, *ROWS]
GENERATE, EXPORT = ["generate", *BASE, "--prompt=p"], ["export", *BASE, *OUT]
GGUF = [*EXPORT, "--format=gguf", "--gguf-type=Q4_0"]
PACKED_PAIRS = ["--objective=dpo", "--packing", "--max_length=64", "--steps=2"]
# Options whose path does not exist, and the command line, which ends with the path.
MISSING = [
    ("model", ["train", *ROWS, *OUT, "--model", "nothing"]),
    ("model", ["score", *ROWS, "--model", "no/thing"]),
    ("model", ["generate", "--prompt=p", "--model", "nothing.gguf"]),
    ("model", ["export", *OUT, "--format=merged", "--model", "/no/thing"]),
    ("data", ["train", *BASE, *OUT, "--data", "nothing.jsonl"]),
    ("data", ["train", *BASE, *OUT, "--data", "./nothing/"]),
    ("data", ["score", *BASE, "--data", "nothing"]),
    ("adapter", [*SCORE, "--adapter", "nothing"]),
    ("adapter", [*SCORE, "--adapter", "no/thing"]),
    ("adapter", [*GENERATE, "--adapter", "nothing.gguf"]),
    ("adapter", [*EXPORT, "--adapter", "run/adapter/nothing"]),
    ("prompts", ["generate", *BASE, "--prompts", "nothing.jsonl"]),
    ("template", [*TRAIN, "--template", "nothing.jinja"]),
    ("template", [*SCORE, "--template", "nothing.jinja"]),
    ("template", [*GENERATE, "--template", "nothing.jinja"]),
    ("run", ["export", "--run", "nothing"]),
    ("config", ["train", "--config", "nothing.yaml"]),
    ("config", ["score", "--config", "nothing.yaml"]),
]
# Command lines with wrong values, and a part of the error message.
WRONG = [
    ([*SCORE, "--dtype=f64"], "`dtype` must be float32, bfloat16 or float16. Got f64."),
    ([*TRAIN, "--fmt=nf5"], "mxfp4, nvfp4 or none. Got nf5."),
    ([*TRAIN, "--remat=maybe"], "`remat` must be true or false or offload. Got maybe."),
    ([*TRAIN, "--steps=1.5"], "`steps` must be an integer. Got 1.5."),
    ([*TRAIN, "--beta2=x"], "`beta2` must be a number. Got x."),
    ([*TRAIN, "--keys=3"], "`keys` must be a mapping. Got 3."),
    ([*TRAIN, "--double-quant=2"], "`double_quant` must be true or false. Got 2."),
    ([*TRAIN, "--learning-rate=x"], "`learning_rate` must be "),
    ([*EXPORT, "--for=x"], "`for` must be vllm, sglang, llama.cpp, ollama, mlx or "),
    ([*EXPORT, "--gguf-type=Q4_K_M"], "must be F16, Q8_0 or Q4_0. Got Q4_K_M."),
    ([*GGUF, "--fmt=nf4"], "`fmt` must be left out with `gguf_type` Q4_0"),
    ([*GGUF, "--block-size=32"], "`block_size` must be left out with `gguf_type` Q4_0"),
    ([*EXPORT, "--format=x"], "`format` must be peft, peft-portable, gguf-lora, mlx"),
    ([*TRAIN, "--config=wrong.yaml"], "`fmt` must be nf4, fp4"),
    ([*TRAIN, "--config=twice.yaml"], "twice.yaml: Got 'rank' more than once."),
    ([*TRAIN, "--config=list.yaml"], "`config` must be a YAML file of settings."),
    ([*TRAIN, "--config=base"], "`config` must be a YAML file of settings."),
    (["train", *BASE], "`data` and `out` must be given."),
    ([*TRAIN, "--nothing=3"], "unrecognized arguments: --nothing=3."),
    ([*TRAIN, "--lr", "1e-3"], "--lr 1e-3. Did you mean `learning_rate`?"),
    ([*TRAIN, "--batch-sise=2"], "Did you mean `batch_size`?"),
    (
        ["train", *BASE, *ROWS, "--out=no_run"],
        "`out` must be new or empty. Got no_run,",
    ),
    (["train", *BASE, *ROWS, "--out=rows.jsonl"], "`out` must be a folder."),
    (["train", *BASE, *ROWS, "--out=gs://bucket/run"], "`out` must be a path, such as"),
    (["export", *BASE, "--format=merged", "--out=gs://bucket/x"], "to a path, such as"),
    ([*TRAIN, "--resume"], "`out` must have a run to resume. Got new, which has no"),
    (["export", "--run=base"], "`run` must be the folder of a run of train, with"),
    (["export", "--run=rows.jsonl"], "`run` must be the folder of a run of train, "),
    ([*SCORE, "--adapter=no_run"], "`adapter` must be a folder with adapter_config"),
    (["generate", *BASE, "--prompts=base"], "`prompts` must be a file (.jsonl, "),
    (["train", *BASE, *ROWS, "--out="], "`out` must be a path. Got ''."),
    (["export", *BASE, "--format=merged", "--out="], "`out` must be a path. Got ''."),
    (
        ["generate", *BASE, "--prompts=rows.jsonl", "--out="],
        "`out` must be a path. Got",
    ),
    (["score", *BASE, *ROWS, "--batch-tokens=1"], "`batch_tokens` must be at least 2"),
    (["score", *BASE, "--data=base"], "or .parquet). Got 'base'"),
    (["train", *BASE, *OUT, "--data=wrapped.json"], "an object with ['data']."),
    (["train", *BASE, *OUT, "--data=one_line.json"], "object whose `data` is a list"),
    (
        # Each answer fits a row, but not both. Nothing is written, with `steps` either.
        ["train", *BASE, *OUT, "--data=pairs.jsonl", *PACKED_PAIRS],
        "at most 64 tokens, both answers of a pair together. Got ['pairs.jsonl:1']",
    ),
    (
        ["train", *BASE, *OUT, "--data=pairs", *PACKED_PAIRS],
        "both answers of a pair together. Got ['pairs/valid.jsonl:1']",
    ),
    (
        ["train", *BASE, *OUT, "--data=surrogate.jsonl"],
        "surrogates not allowed",
    ),
    (
        ["score", *BASE, "--data=surrogate.jsonl"],
        "surrogates not allowed",
    ),
    (
        ["generate", *BASE, "--prompts=prompts.jsonl"],
        "surrogates not allowed",
    ),
    (["generate", *BASE, "--prompt", "\udcff"], "surrogates not allowed"),
]


@pytest.fixture
def run_wrong_command(files, tmp_path, monkeypatch, capsys):
    """Runs a wrong command line in the folder of `files`; returns its error message."""
    monkeypatch.chdir(files)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:1")

    def run_wrong_command(arguments):
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as stopped:
            status = stopped.code
        out, err = capsys.readouterr()
        assert status in (1, 2) and out == ""
        assert not any((files / name).exists() for name in ("new", "gs:"))
        command = arguments[0]
        assert err.startswith(f"qlora-jax {command}: ")
        assert err.endswith(f"See qlora-jax {command} --help.\n") == (status == 2)
        assert not any(word in err for word in ("Traceback", "Subtypes", "typing."))
        return err

    return run_wrong_command


@pytest.mark.parametrize("option, arguments", MISSING)
def test_what_is_missing_is_called_so(run_wrong_command, option, arguments):
    err = run_wrong_command(arguments)
    assert f"`{option}` " in err.splitlines()[0] and "missing" in err
    assert arguments[-1].split(",")[-1].split("/")[-1] in err
    other_options = {name for name, _ in MISSING} - {option}
    assert not [name for name in other_options if f"`{name}`" in err]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_what_is_wrong_is_named(run_wrong_command, arguments, message):
    err = run_wrong_command(arguments)
    assert message in err and len(err.splitlines()) <= 5
    assert "`--resume`" not in err


def test_an_error_for_lack_of_memory_is_one_line(run_wrong_command, files, monkeypatch):
    def ask_for_a_petabyte(config):
        return jax.block_until_ready(jnp.zeros(1 << 50))

    monkeypatch.setattr(app, "score", ask_for_a_petabyte)
    [line] = run_wrong_command(SCORE).splitlines()
    assert "the device is out of memory" in line and str(1 << 52) in line

    def ask_numpy_for_a_petabyte(config):
        return np.zeros(1 << 50)

    monkeypatch.setattr(app, "score", ask_numpy_for_a_petabyte)
    [line] = run_wrong_command(SCORE).splitlines()
    assert "score: no memory is left. Unable to allocate" in line
