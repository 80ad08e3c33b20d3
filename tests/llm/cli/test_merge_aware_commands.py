"""Merge-aware adapters: `train`, and the commands that use its runs."""

import functools
import json
import re
import shutil
from typing import get_args

import pytest
from commands import rows_of, settings, write_letters
from commands import run as run_command
from helpers import refusal
from tolerances import rounding

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.configs import TargetFmt
from qlora_jax.llm.app.exporting.pairing import MERGED, open_pair
from qlora_jax.llm.app.servers import FMTS_BY_FORMAT
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.trees.paths import leaves_by_path

# The loss of a run is compared with the loss of `score`, which renders the rows.
OPTIONS = dict(chat=True, max_length=64, eval_examples=0, target_modules="all-linear")
OPTIONS |= dict(steps=4, learning_rate=5e-2)
FORMS = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int4_f16": "compressed-tensors"}
FORMS |= {"mxfp4": "mxfp4", "nvfp4": "nvfp4", "q4_0": "compressed-tensors"}


def run(capsys, *arguments):
    """Runs a command with `--json`; returns its status, its JSON and its stderr."""
    status, out, err = run_command(capsys, *arguments, "--json")
    return status, json.loads(out) if out else None, err


def score(model, data):
    return app.score(app.ScoreConfig(str(model), str(data))).loss


# With noise, other weights would be rounded to another code.
without_noise = pytest.mark.without_noise


def is_near(loss, expected):
    return abs(loss / expected - 1) < rounding(128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model whose sizes are multiples of all blocks, and data."""
    folder = tmp_path_factory.mktemp("merge_aware")
    sizes = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    save_tiny(folder / "base", **sizes)
    return write_letters(folder)


def train(folder, out, **options):
    return app.train(settings(folder / "base", folder, out, **OPTIONS | options))


@pytest.fixture(scope="module")
def aware(folder):
    """A merge-aware run for nf4, on a float base."""
    train(folder, folder / "aware", fmt="none", merge_aware="nf4")
    return folder / "aware"


@pytest.fixture(scope="module")
def plain(folder):
    """An ordinary run on the same base."""
    train(folder, folder / "plain", fmt="none", lora_alpha=8)
    return folder / "plain"


def test_the_formats_to_train_for_are_those_of_files():
    assert {*FORMS} == {x for fmts in FMTS_BY_FORMAT.values() for x in fmts}
    assert {*FORMS} == {*get_args(TargetFmt)}


@pytest.mark.slow
@without_noise
def test_the_file_has_the_loss_of_training(folder, aware, capsys):
    data = folder / "valid.jsonl"
    status, written, err = run(capsys, "export", "--run", aware)
    assert status == 0 and "merged and packed in nf4 in blocks of 64" in err
    assert written["format"] == "bitsandbytes" and written["cost"] is None
    assert written["out"] == str(aware / "model-4")
    trained = rows_of(aware)[-1]["valid_loss"]
    assert trained < rows_of(aware)[0]["valid_loss"] - 0.1  # it learnt something
    assert is_near(score(written["out"], data), trained)
    # So has the adapter in the folder of its run, and a float model of these values.
    source = ["--model", folder / "base", "--adapter", aware / "adapter"]
    scored = run(capsys, "score", *source, "--data", data)[1]
    assert is_near(scored["loss"], trained)
    merged = ["--format=merged", "--out", aware / "merged"]
    assert run(capsys, "export", *source, *merged)[0] == 0
    assert is_near(score(aware / "merged", data), trained)


@without_noise
@pytest.mark.slow
@pytest.mark.parametrize(
    "fmt, target",
    [("nf4", "q4_0"), ("int8", "fp4"), ("none", "mxfp4"), ("none", "nvfp4")]
    + [("int8", "int4_f16"), ("fp4", None)],
)
def test_each_file_has_the_loss_of_training(folder, tmp_path, capsys, fmt, target):
    options = dict(fmt=fmt, merge_aware=target or True)
    trained = train(folder, tmp_path / "run", **options).valid_loss
    command = ["export", "--run", tmp_path / "run"]
    if target == "q4_0":  # by default a GGUF file, which is not read
        command += ["--format=compressed-tensors", "--out", tmp_path / "packed"]
    written = run(capsys, *command)[1]
    assert written["format"] == FORMS[target or fmt]
    assert is_near(score(written["out"], folder / "valid.jsonl"), trained)


def test_other_programs_cannot_take_it_for_a_lora(aware):
    names = {path.name for path in (aware / "adapter").iterdir()}
    assert names == {"README.md", "adapter.safetensors"}  # no adapter_config.json
    card = (aware / "adapter" / "README.md").read_text()
    assert "library_name: qlora-jax" in card and "loads with PEFT" not in card
    tree = ql.io.restore(aware / "adapter" / "adapter.safetensors").tree
    packings = {x.packing for x in leaves_by_path(tree).values()}
    assert packings == {ql.QLoRAConfig(fmt="nf4").packing}


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--format=peft"], "Beside its base, the adapter would compute something"),
        (["--format=gguf-lora"], "Got gguf-lora. Leave `format` out"),
        (["--format=mxfp4"], "would round them again. Got mxfp4."),
        (["--format=bitsandbytes", "--fmt=fp4"], "Got bitsandbytes, fmt=fp4."),
        (["--format=bitsandbytes", "--double-quant=false"], "double_quant=False."),
        (["--format=gguf"], "must hold nf4 in blocks of 64, with quantized scales"),
        (["--format=gguf", "--gguf-type=F16"], "Got gguf, gguf_type=F16."),
        (["--format=merged", "--dtype=float16"], "Got float16 for float32."),
        (["--for=llama.cpp"], "it does not support nf4 in blocks of 64"),
    ],
)
def test_no_other_format_is_written(aware, tmp_path, capsys, options, reason):
    command = ["export", "--run", aware, "--out", tmp_path / "out", *options]
    status, _, err = run(capsys, *command)
    assert status == 1 and reason in err
    assert not (tmp_path / "out").exists()


def test_layers_without_an_adapter_are_not_rounded(folder, aware, capsys):
    # With the library, one can also train an adapter of some layers of a float model.
    lora = ql.io.restore(aware / "adapter" / "adapter.safetensors").tree
    ql.io.save(folder / "some.safetensors", {"layers": {"mlp": lora["layers"]["mlp"]}})
    source = ["--model", folder / "base", "--adapter", folder / "some.safetensors"]
    command = ["export", *source, "--out", folder / "some"]
    status, _, err = run(capsys, *command)
    assert status == 1 and "Got none for layers/self_attn/k_proj/kernel, " in err


def test_servers_get_one_model(aware, tmp_path, capsys):
    for server, base in {"transformers": "bitsandbytes", "mlx": "merged"}.items():
        config = app.ExportConfig(None, None, "x", run=str(aware), server=server)
        pair = open_pair(config)[2]
        assert (pair.base, pair.adapter, pair.exact) == (base, MERGED, True)
    out = tmp_path / "served"
    command = ["export", "--run", aware, "--out", out]
    status, _, err = run(capsys, *command, "--for=ollama")
    assert status == 1 and "ollama cannot run" in err and not out.exists()
    status, written, _ = run(capsys, *command, "--for=vllm")
    assert status == 0 and {x.name for x in out.iterdir()} == {"model"}
    assert written["start"].startswith("vllm serve ./model\n")


def test_it_answers_as_its_file(aware, capsys):
    out = aware / "answering"
    assert run(capsys, "export", "--run", aware, "--out", out)[0] == 0
    command = ["generate", "--prompt=ab=", "--max-new-tokens=4"]
    by_run, by_file = (
        run(capsys, *command, *source)[1]["answers"][0]["text"]
        for source in (["--run", aware], ["--model", out])
    )
    assert by_run == by_file


@pytest.mark.slow
def test_a_target_in_the_format_of_the_base_has_its_blocks(folder, tmp_path, capsys):
    base = dict(fmt="nf4", block_size=32, double_quant=False)
    train(folder, tmp_path / "run", merge_aware="nf4", steps=2, **base)
    assert run(capsys, "export", "--run", tmp_path / "run")[0] == 0
    config = json.loads((tmp_path / "run" / "model-2" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False
    tensors = ql.io.packed_tensors(ql.io.open_safetensors(tmp_path / "run" / "model-2"))
    packings = {getattr(x, "packing", None) for x in tensors.values()} - {None}
    assert packings == {ql.QLoRAConfig(**base).packing}


@pytest.mark.slow
@without_noise
def test_an_ordinary_adapter_starts_a_merge_aware_one(folder, plain, capsys):
    # The first loss is that of the ordinary adapter, merged and packed.
    start = dict(adapter=str(plain / "adapter"), fmt="none")
    train(folder, folder / "started", merge_aware="nf4", steps=2, **start)
    data, out = folder / "valid.jsonl", folder / "packed"
    command = ["export", "--run", plain, "--format=bitsandbytes", "--out", out]
    assert run(capsys, *command)[0] == 0
    before = rows_of(folder / "started")[0]["valid_loss"]
    assert is_near(before, score(out, data))
    assert not is_near(before, rows_of(plain)[-1]["valid_loss"])
    # The scaling is that of the adapter.
    assert "lora_alpha: 8.0\n" in (folder / "started" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(rank=8), "has rank 4 instead of 8"),
        (dict(lora_alpha=4.0), "`lora_alpha` must be 8 or left out"),
        (dict(target_modules="q_proj", fmt="nf4"), "mlp/up_proj/kernel is not trained"),
        (dict(adapter="nowhere"), "`adapter` must be a path or a hub id"),
    ],
)
def test_other_adapters_cannot_start_one(folder, plain, tmp_path, options, reason):
    start = dict(adapter=str(plain / "adapter"), fmt="none", merge_aware="nf4")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)):
        train(folder, tmp_path / "out", **start | options)
    assert not (tmp_path / "out").exists()


def test_a_merge_aware_adapter_starts_no_ordinary_one(folder, aware, tmp_path):
    options = dict(adapter=str(aware / "adapter"), fmt="none")
    start = functools.partial(train, folder, tmp_path / "out", **options)
    refusal(start, "has another kind, merge-aware")


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(merge_aware=True, lora_dropout=0.1), "`merge_aware` must be false with"),
        (dict(merge_aware=True, use_dora=True), "and use_dora=True"),
        (dict(adapter="a", use_dora=True), "`use_dora` must be false with `adapter`"),
        (dict(merge_aware="int8"), "`merge_aware` must be true or false or nf4, fp4,"),
        (dict(merge_aware=True, fmt="none"), "Got true and a base in float."),
        (dict(merge_aware=True, fmt="int8"), "a base in int8 in blocks of 64"),
        (
            dict(merge_aware="q4_0", target_modules="q_proj"),
            "`target_modules` must be all linear layers with `merge_aware`",
        ),
        (
            dict(merge_aware="q4_0", trainable=".*/up_proj/kernel"),
            "without layers/mlp/up_proj/kernel.",
        ),
    ],
)
def test_wrong_settings_are_refused_before_training(folder, tmp_path, options, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        train(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_target(folder, aware, tmp_path):
    copy = shutil.copytree(aware, tmp_path / "copy")
    options = dict(fmt="none", merge_aware="fp4", resume=True)
    resume = functools.partial(train, folder, copy, **options)
    words = "`resume` must be used with the settings of the run", "'nf4'", "'fp4'"
    refusal(resume, *words)
