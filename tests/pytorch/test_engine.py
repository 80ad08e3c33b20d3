"""The command line trains models in PyTorch's code, scores them, and generates.

The losses and the generated tokens equal those of transformers and PEFT.
"""

import json
import pathlib
import shutil
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from engine_models import ROWS, save_model, torch_loss, write_rows
from tokenizers import Tokenizer
from tolerances import assert_close
from torch_helpers import init, with_decoded_weights

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.models.torch_decoder import _Joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a run, and the rows and the model that it trained on."""
    folder = tmp_path_factory.mktemp("engine")
    save_model(folder / "model", transformers.GPTNeoXConfig)
    write_rows(folder)
    settings = {"steps": 3, "batch_size": 4, "max_length": 64, "dtype": "float32"}
    settings |= {"learning_rate": 1e-2, "rank": 4}
    command = ["train", *arguments(folder), "--out", str(folder / "run")]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    return folder


def arguments(folder):
    return ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]


def test_score_of_a_trained_adapter_equals_the_loss_in_peft(folder):
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    # The packed weights of training: all linear layers but the head.
    _, base, _ = init(module, r".*(query_key_value|dense\w*)\.weight", block_size=64)
    with_decoded_weights(module, base)
    before = torch_loss(module)
    with warnings.catch_warnings():  # PEFT asks transformers for a deprecated name
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(module, folder / "run" / "adapter")
    expected = torch_loss(model.eval())
    assert expected < before - 0.01
    config = app.ScoreConfig(
        run=str(folder / "run"), data=str(folder / "rows.jsonl"), batch_tokens=64
    )
    score = app.score(config)
    assert score.tokens == sum(len(row["input_ids"]) - 1 for row in ROWS)
    assert_close(np.asarray(score.loss), np.asarray(expected))


def test_a_trained_adapter_generates_the_tokens_of_peft(folder, tmp_path):
    module = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    _, base, _ = init(module, r".*(query_key_value|dense\w*)\.weight", block_size=64)
    with_decoded_weights(module, base)
    with warnings.catch_warnings():  # PEFT asks transformers for a deprecated name
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(module, folder / "run" / "adapter")
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    prompts = ["A", "Two words"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        row = model.generate(
            input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        expected.append(tokenizer.decode(row[0, ids.shape[1] :].tolist()))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in prompts))
    config = app.GenerateConfig(
        run=str(folder / "run"), prompts=str(file), chat=False, max_new_tokens=8
    )
    assert [x.text for x in app.generate(config).answers] == expected


def test_training_answers_validation_rows(folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    row = json.dumps({"prompt": "One and one", "completion": "is two"}) + "\n"
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text(row)
    command = ["train", "--model", str(folder / "model"), "--data", str(data)]
    command += ["--out", str(out), "--steps", "1", "--chat", "false"]
    assert main([*command, "--max_length", "64"]) == 0
    [answer] = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    assert sorted(answer) == ["after", "before", "prompt", "right"]


@pytest.mark.parametrize("source", ["run", "model and adapter", "moved adapter"])
def test_a_merged_folder_has_the_loss_of_the_adapter(folder, tmp_path, source):
    out = tmp_path / "merged"
    run = str(folder / "run")
    command = ["export", "--format", "merged", "--out", str(out)]
    if source == "run":
        command += ["--run", run]
    else:
        adapter = folder / "run" / "adapter"
        if source == "moved adapter":  # no settings of a run name the engine
            adapter = shutil.copytree(adapter, tmp_path / "adapter")
        command += ["--model", str(folder / "model"), "--adapter", str(adapter)]
        command += ["--fmt", "nf4"] if source == "moved adapter" else []
    assert main(command) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    expected = torch_loss(merged)
    score = app.score(app.ScoreConfig(run=run, data=str(folder / "rows.jsonl")))
    assert_close(np.asarray(score.loss), np.asarray(expected))


REFUSED = {
    "stream_dtype": "must be float32, because the dtype of its residual stream is",
    "merge_aware": "must be False, because `export` writes no 4-bit files of these",
    "mlp_tile": "must be None, because its MLPs take all tokens at a time. Got 1.",
    "objective": "because losses with a teacher need the head of our decoder. Got",
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_the_engine_lacks_are_refused(folder, tmp_path, name, capsys):
    values = {"objective": "distill", "mlp_tile": "1", "stream_dtype": "bfloat16"}
    value = values.get(name, "true")
    command = ["train", *arguments(folder), "--out", str(tmp_path / "run")]
    assert main([*command, f"--{name}", value]) == 1
    error = capsys.readouterr().err
    assert f"`{name}` must be " in error and REFUSED[name] in error


def test_files_for_other_programs_are_refused(folder, tmp_path, capsys):
    out = str(tmp_path / "model.gguf")
    run = str(folder / "run")
    assert main(["export", "--run", run, "--format", "gguf", "--out", out]) == 1
    assert "`format` must be one of peft" in capsys.readouterr().err
    assert not pathlib.Path(out).exists()


def test_without_torchax_the_extra_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qlora_jax.torch", None)
    monkeypatch.delattr(ql, "torch")
    command = ["train", *arguments(folder), "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "pip install 'qlora-jax[torch]'" in capsys.readouterr().err


def test_the_engine_computes_what_the_decoder_computes(tmp_path):
    model, data = save_tiny(tmp_path / "model"), write_rows(tmp_path)
    scores = [
        app.score(app.ScoreConfig(model, data, engine=engine))
        for engine in ("jax", "torch")
    ]
    assert_close(np.asarray(scores[1].loss), np.asarray(scores[0].loss))


def test_weights_that_files_store_transposed(tmp_path):
    changes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = save_model(tmp_path / "model", transformers.GPT2Config, **changes)
    module = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    expected = torch_loss(module)
    score = app.score(app.ScoreConfig(str(model), write_rows(tmp_path)))
    assert_close(np.asarray(score.loss), np.asarray(expected))


@pytest.mark.parametrize("rows", [(2, 2), (5, 1), (1, 4), (0, 6)])
def test_slices_of_joined_matrices(rows):
    matrices = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 3), np.float64)
    joined, expected = _Joined(matrices), np.concatenate(matrices)
    part = joined[slice(*rows), 1:]
    np.testing.assert_array_equal(part, expected[slice(*rows), 1:])
    assert part.dtype == expected.dtype == joined.dtype
    with pytest.raises(ValueError, match="must have step 1"):
        joined[::2, :]
