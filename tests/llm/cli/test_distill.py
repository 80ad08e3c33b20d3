"""`qlora-jax train --objective distill`: learns from a teacher."""

import pathlib
import shutil

import commands
import numpy as np
import pytest
from commands import ADAPTER, losses, rows_of, run, settings
from tokenizer_helpers import write_rows
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.tiny import save_tiny

# The loss of a student that differs from its teacher by packing alone is small.
OPTIONS = dict(objective="distill", eval_examples=0, learning_rate=5e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("distill") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A teacher with other weights and another size."""
    changes = dict(hidden_size=32, tie_word_embeddings=True)
    return save_tiny(tmp_path_factory.mktemp("teacher") / "base", seed=1, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return commands.write_letters(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_the_packed_model_learns_from_its_float_weights(folder, data, tmp_path, capsys):
    config = settings(folder, data, tmp_path / "run", **OPTIONS, steps=30)
    result = app.train(config)
    rows = rows_of(config.out)
    assert result.valid_loss == rows[-1]["valid_loss"] < 0.8 * rows[0]["valid_loss"]
    assert not any("valid_perplexity" in row for row in rows)
    assert f", validation {result.valid_loss:.4f} at step 30" in capsys.readouterr().err


def divergence(model, teacher, rows, temperature):
    """Returns the mean divergence over the bytes of completions, in float64."""
    log_probs = []
    for folder, fmt in ((model, "nf4"), (teacher, None)):
        packing = fmt and ql.QLoRAConfig(fmt=fmt, targets="layers/.*_proj/kernel")
        config, params = load(folder, qlora=packing, progress=False)
        apply = ql.linen.wrap(Decoder(config)).apply
        ids = np.array([[*row.encode()] for row in rows])
        logits = np.float64(apply({"params": params}, ids)) / temperature
        log_probs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    log_q, log_p = (x[:, 2:-1] for x in log_probs)  # before the completions
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean() * temperature**2)


def test_the_loss_is_the_divergence_from_another_model(folder, other, tmp_path):
    texts = ["ab=aa", "cd=cc", "ef=ee"]
    labels = [-100] * 3 + [97] * 2
    rows = [{"input_ids": [*text.encode()], "labels": labels} for text in texts]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options = OPTIONS | dict(teacher=other, temperature=2.0, warmup=0, steps=1)
    config = settings(folder, path, tmp_path / "run", **options, batch_size=3)
    result = app.train(config)
    num_bytes = sum(x.nbytes for x in ql.io.open_safetensors(other).values())
    assert result.bytes["teacher"] == num_bytes  # in float32, as in the file
    expected = divergence(folder, other, texts, 2.0)
    assert expected > 0.1
    assert_close(losses(config.out)[0], expected, magnitude=10 * expected)


@pytest.mark.slow
def test_a_run_resumes_with_the_same_teacher(folder, other, data, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(other, teacher)
    options = dict(teacher=str(teacher), lora_dropout=0.1, steps=6, save_every=2)
    arguments = [folder, data]
    whole = settings(*arguments, tmp_path / "whole", **OPTIONS, **options)
    app.train(whole)
    part = settings(*arguments, tmp_path / "part", **OPTIONS, **options)
    app.train(part)
    shutil.rmtree(tmp_path / "part" / "state" / "6")
    resumed = options | dict(resume=True)
    app.train(settings(*arguments, tmp_path / "part", **OPTIONS, **resumed))
    files = [pathlib.Path(x.out) / ADAPTER for x in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert losses(part.out) == losses(whole.out)
    command = ["train", "--config", tmp_path / "part/config.yaml", "--resume"]
    status, _, err = run(capsys, *command, "--temperature", 3)
    assert status == 1 and "temperature was 1, is 3" in err
    status, _, err = run(capsys, *command, "--teacher", folder)
    assert status == 1 and "teacher's files was" in err


@pytest.mark.slow
def test_a_mesh_splits_the_teacher(folder, other, data, tmp_path):
    options = OPTIONS | dict(teacher=other, steps=3, block_size=16)
    alone = settings(folder, data, tmp_path / "alone", **options)
    options |= dict(mesh="fsdp=4,tensor=2")
    split = settings(folder, data, tmp_path / "mesh", **options)
    assert_close(app.train(split).valid_loss, app.train(alone).valid_loss)
    assert_close(losses(split.out), losses(alone.out))


def test_wrong_teachers_are_refused(folder, data, tmp_path, capsys):
    small, packed = save_tiny(tmp_path / "small", vocab_size=300), tmp_path / "packed"
    app.export(app.ExportConfig(folder, "bitsandbytes", str(packed)))
    command = ["train", "--data", data, "--out", tmp_path / "out", "--objective"]
    command += ["distill", "--model"]
    for arguments, message in (
        ([folder, "--teacher", small], "must have the vocabulary of the model. Got"),
        (
            [folder, "--fmt", "none"],
            "must be given unless training packs a float model",
        ),
        ([packed], "`teacher` must be given unless training packs a float"),
    ):
        status, _, err = run(capsys, *command, *arguments)
        assert status == 1 and message in err, err
    for options, message in (
        (dict(teacher=folder), "`teacher` must be left out with sft"),
        (OPTIONS | dict(temperature=0), "`temperature` must be positive and finite"),
        (dict(objective="ppo"), "`objective` must be one of sft, distill, dpo"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(folder, data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_vocabularies_are_compared(folder, data, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(folder, teacher)
    path = teacher / "tokenizer.json"
    text = path.read_text()
    swapped = text.replace('"a":', '"?":').replace('"b":', '"a":')
    path.write_text(swapped.replace('"?":', '"b":'))
    assert path.read_text() != text
    config = settings(folder, data, tmp_path / "out", **OPTIONS, teacher=str(teacher))
    with pytest.raises(ValueError, match="Got .* with other ids for"):
        app.train(config)
