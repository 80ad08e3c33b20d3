"""`qlora-jax train`: results, files, wrong settings, and interrupted runs."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time

import commands
import pytest
import yaml
from commands import ADAPTER, PROGRAM, losses, rows_of, run_python, settings
from helpers import assert_same_bits
from stored import export, tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app import environment
from qlora_jax.llm.app.commands.train import _end_at_signal
from qlora_jax.llm.app.open_model import OpenModel
from qlora_jax.llm.app.processes import StopAtSignal, catch_signals
from qlora_jax.llm.app.run_folder import (
    open_run_folder,
    read_run_config,
    write_run_config,
)
from qlora_jax.llm.app.training import evaluation
from qlora_jax.llm.app.training.program import make_program
from qlora_jax.llm.app.training.resuming import check_fingerprint
from qlora_jax.llm.app.training.run import has_flash_attention, make_batches, make_run
from qlora_jax.llm.cli.parser import parse
from qlora_jax.llm.data import batching, open_tokenizer, read_dataset
from qlora_jax.llm.models.checkpoint import abstract_params
from qlora_jax.llm.models.config import DecoderConfig, Experts
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.jax_engine import JaxEngine
from qlora_jax.llm.models.tiny import save_tiny
from qlora_jax.llm.train import read_metrics
from qlora_jax.llm.train.target_modules import find_target_paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("train") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return commands.write_letters(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(folder, data, tmp_path_factory):
    """The settings, result and folder of a run that uses most options."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = dict(fmt="none", accumulation=2, lora_dropout=0.1, log="tensorboard")
    options |= dict(schedule="cosine", warmup=None, save_every=10, eval_every=3)
    options |= dict(target_modules="all-linear", steps=30)
    config = settings(folder, data, out, **options)
    return config, app.train(config), out


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_others_read(run, folder, data, tmp_path):
    _, result, out = run
    rows = rows_of(out)
    assert [row["step"] for row in rows] == list(range(31))
    evaluated = [row for row in rows if "valid_loss" in row]
    assert [row["step"] for row in evaluated] == list(range(0, 31, 3))
    assert result.valid_loss == rows[-1]["valid_loss"] < rows[0]["valid_loss"] / 2
    for row in evaluated:
        assert row["valid_perplexity"] == pytest.approx(math.exp(row["valid_loss"]))
    # `qlora-jax score` computes the same loss from the adapter and rows of tokens.
    options = dict(vocab_size=259, max_length=16, chat=False)
    dataset = read_dataset(data, open_tokenizer(folder), **options)

    def as_tokens(row):
        return {"input_ids": row.ids.tolist(), "labels": row.labels.tolist()}

    token_rows = map(as_tokens, dataset.valid)
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, token_rows)))
    scored = app.ScoreConfig(folder, str(tmp_path / "plain.jsonl"), result.adapter)
    assert_close(result.valid_loss, app.score(scored).loss)

    # The reported exact match is that of the answers in answers.jsonl.
    def read_jsonl(path):
        return list(map(json.loads, path.read_text().splitlines()))

    rows = read_jsonl(out / "answers.jsonl")
    valid_rows = read_jsonl(data / "valid.jsonl")
    assert [row["right"] for row in rows] == [row["completion"] for row in valid_rows]

    def exact_share(key):
        return sum(row[key].strip() == row["right"] for row in rows) / 6

    exact_match = result.exact_before, result.exact_after
    assert (exact_share("before"), exact_share("after")) == exact_match
    names = "adapter answers.jsonl config.yaml loss.png metrics.jsonl result.json state"
    names = [*names.split(), "tensorboard"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.slow
def test_a_run_can_start_without_an_evaluation(folder, data, tmp_path):
    options = dict(steps=2, eval_every=1, eval_on_start=False, eval_examples=2)
    result = app.train(settings(folder, data, tmp_path / "run", **options))
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
    assert result.exact_before is None and result.exact_after is not None
    assert "before" not in str(result)
    [row, *_] = (tmp_path / "run" / "answers.jsonl").read_text("utf-8").splitlines()
    assert {*json.loads(row)} == {"prompt", "right", "after"}


def test_preferences_do_not_drop_the_loss_that_balances_experts():
    experts = Experts(count=2, per_token=1, balance=0.1)
    decoder = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2, experts=experts)
    config = settings("model", "data", "out", objective="dpo")
    with pytest.raises(ValueError, match="must be false for preferences, .*'dpo'"):
        make_program(config, JaxEngine(pathlib.Path("model"), decoder))


@pytest.mark.slow
def test_a_mixture_of_experts_is_trained_scored_and_written(data, tmp_path, capsys):
    sizes = dict(num_local_experts=4, num_experts_per_tok=2)
    kind = dict(model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    folder = save_tiny(tmp_path / "base", **kind, **sizes)
    run, merged = tmp_path / "run", str(tmp_path / "merged")
    options = dict(fmt="nf4", target_modules=["q_proj", "gate_up_proj", "down_proj"])
    refused = settings(folder, data / "train.jsonl", run, **options, lora_dropout=0.1)
    with pytest.raises(ValueError, match="`lora_dropout` must be 0 .*Got 0.1"):
        app.train(refused)
    result = app.train(settings(folder, data / "train.jsonl", run, **options))
    assert losses(run)[-1] < losses(run)[0]
    export(folder, "merged", merged, result.adapter)
    rows = str(data / "valid.jsonl")
    scores = [  # the run did not turn rows into messages either
        app.score(app.ScoreConfig(model, rows, adapter, chat=False)).loss
        for model, adapter in ((folder, None), (folder, result.adapter), (merged, None))
    ]
    assert scores[2] < scores[0]  # the packed base, on which the adapter was trained
    assert abs(scores[1] - scores[2]) < 0.1  # errors of 4 bits
    options = "--fmt", "nf4", "--prompt", "ab=", "--max_new_tokens", 3
    options += "--adapter", result.adapter
    assert commands.run(capsys, "generate", "--model", folder, *options)[0] == 0


@pytest.mark.slow
def test_the_card_names_the_base_and_the_settings(run, folder):
    _, result, out = run
    card = (pathlib.Path(result.adapter) / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": folder,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "qlora-jax"],
    }
    assert "| learning_rate | 0.02 |" in text and "| rows | 40 |" in text
    assert f"| validation loss | {result.valid_loss:.6g} |" in text
    peft = ql.io.PeftConfig.read(result.adapter)
    assert (peft.r, peft.lora_alpha, peft.lora_dropout) == (4, 4, 0.1)
    assert json.loads((out / "result.json").read_text())["loss"] == result.loss


def state_of(out):
    """Returns the contents of all files in a folder."""
    files = [path for path in pathlib.Path(out).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=8), "rank was 4, is 8"),
        (dict(seed=1, learning_rate=0.1), "learning_rate was 0.02, is 0.1; seed was"),
        (dict(steps=31), "steps was 30, is 31"),
        (dict(target_modules=["q_proj"]), r"target_modules was 'all-linear', is \['q"),
        (dict(data="other"), "data was '"),
        (dict(model="other"), "model's files was '"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    run, data, tmp_path, options, message
):
    config, _, out = run
    if "data" in options:
        options = dict(data=str(tmp_path))
        for name in ("train.jsonl", "valid.jsonl"):
            text = (data / name).read_text().replace("aa", "bb")
            (tmp_path / name).write_text(text)
    elif "model" in options:
        options = dict(model=save_tiny(tmp_path / "model", seed=1))
    before = state_of(out)
    with pytest.raises(ValueError, match=message):
        app.train(config.replace(resume=True, **options))
    assert state_of(out) == before


@pytest.mark.slow
def test_a_run_goes_on_with_the_date_on_which_it_began(folder, tmp_path):
    template, data, out = (tmp_path / name for name in ("t.jinja", "d.jsonl", "run"))
    template.write_text(
        "{{ strftime_now('%d %m') }}{% for m in messages %}{{ m.content }};{% endfor %}"
    )
    rows = [{"role": role, "content": "hi"} for role in ("user", "assistant")]
    data.write_text(json.dumps({"messages": rows}))
    options = dict(template=str(template), chat=True, steps=2)
    config = settings(folder, data, out, date="2026-01-30", **options)
    app.train(config)
    # Commands that use the run read this copy.
    assert (out / "template.jinja").read_text() == template.read_text()
    again = config.replace(date=None, resume=True, steps=3)
    assert app.train(again).steps == 3
    with pytest.raises(ValueError, match="data was '"):
        app.train(again.replace(date="2026-01-31"))


INTEL = ["vendor_id : GenuineIntel", "flags : fma avx2 avx512f avx512_bf16"]
AMD = ["vendor_id : AuthenticAMD", INTEL[1]]


@pytest.mark.parametrize(
    ("platform", "cpuinfo", "dtype"),
    [
        ("cpu", INTEL, "float32"),
        ("cpu", [INTEL[0], INTEL[1] + " amx_bf16"], "bfloat16"),
        ("cpu", AMD, "bfloat16"),
        ("cpu", [AMD[0], "flags : fma avx2"], "float32"),
        ("cpu", [], "float32"),  # not Linux
        ("tpu", INTEL, "bfloat16"),
    ],
)
def test_the_fastest_dtype_depends_on_the_processor(
    platform, cpuinfo, dtype, monkeypatch
):
    monkeypatch.setattr(environment, "read_cpuinfo", lambda: cpuinfo)
    assert environment.fastest_dtype(platform) == dtype


def test_a_resumed_run_keeps_its_dtype_on_another_processor(
    folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(environment, "read_cpuinfo", lambda: INTEL)
    config = settings(folder, data, tmp_path / "run", dtype="auto", steps=2)
    app.train(config)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dtype"] == (
        "float32"
    )
    monkeypatch.setattr(environment, "read_cpuinfo", lambda: AMD)
    resumed = config.replace(resume=True, steps=3)
    assert make_run(resumed, "").config.dtype == "float32"
    assert app.train(resumed).steps == 3


def test_the_loss_of_packed_validation_rows_is_that_of_padded_ones(
    folder, data, tmp_path
):
    loss_of = {}
    for packing in (False, True):
        out = tmp_path / f"packing={packing}"
        app.train(settings(folder, data, out, packing=packing, steps=2))
        loss_of[packing] = rows_of(out)[0]["valid_loss"]  # before the first step
    assert_close(loss_of[True], loss_of[False])


@pytest.mark.slow
def test_a_finished_run_is_written_again_as_it_was(run):
    config, result, out = run
    before = state_of(out)
    moved = dict(eval_every=7, save_every=5, on_nan="skip")
    again = app.train(config.replace(resume=True, **moved))
    for name in ("steps", "loss", "valid_loss", "exact_before", "exact_after"):
        assert getattr(again, name) == getattr(result, name)
    for name in (ADAPTER, "metrics.jsonl"):
        assert (out / name).read_bytes() == before[name]


@pytest.mark.slow
def test_the_metrics_of_a_finished_run_are_needed(run, tmp_path):
    config, _, out = run
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="copy must have metrics.jsonl, from which"):
        app.train(config.replace(out=str(copy), resume=True))


@pytest.mark.parametrize(
    "target_modules",
    ["q_proj, mlp.up_proj", ["q_proj", "mlp.up_proj"], r".*\.(q|up)_proj"],
)
def test_plain_texts_are_names_of_modules(target_modules):
    config = DecoderConfig(8, 8, 8, 2, num_heads=2, num_kv_heads=1)
    shapes, names = abstract_params(config), decoder_names(config)
    paths = find_target_paths(target_modules, shapes, names)
    assert {path.split("/")[-2] for path in paths} == {"q_proj", "up_proj"}
    [path] = find_target_paths("q_proj", shapes, names)
    assert path.endswith("q_proj/kernel")


def test_rows_that_are_held_out_are_part_of_what_a_run_is(folder, data, tmp_path):
    rows, out = data / "train.jsonl", tmp_path / "run"

    def prepare(**options):
        return make_run(settings(folder, rows, out, **options), "")

    split_options = dict(date="2026-11-29", validation_split=0.25)
    run = prepare(**split_options, packing=True)
    assert (len(run.data.train), len(run.data.valid)) == (30, 10)
    held_out = {row.place for row in run.data.valid}
    assert not held_out & {row.place for row in run.data.train}
    one_epoch = run.config.replace(epochs=1)
    batches = [*make_batches(one_epoch, run.data)]
    assert sum(batch.num_tokens for batch in batches) == sum(
        len(row.ids) for row in run.data.train
    )
    # A resumed run has the same validation rows, or raises an error.
    assert run.fingerprint["validation_split"] == 0.25
    other_split = prepare(**split_options | {"validation_split": 0.5}, packing=True)
    with pytest.raises(ValueError, match="validation_split was 0.25, is 0.5"):
        check_fingerprint(run.fingerprint, other_split.fingerprint, str(out))
    unsplit = prepare(date="2026-11-29", packing=True)
    assert (
        "validation_split" not in unsplit.fingerprint
    )  # as in states of earlier versions
    with pytest.raises(ValueError, match="validation_split was not set, is 0.25"):
        check_fingerprint(unsplit.fingerprint, run.fingerprint, str(out))
    other_seed = prepare(**split_options, seed=5)
    assert {row.place for row in other_seed.data.valid} != held_out


@pytest.mark.slow
def test_a_run_in_float16_resumes_with_its_loss_scale(folder, data, tmp_path, capsys):
    options = dict(dtype="float16", eval_examples=0)
    whole = app.train(settings(folder, data, tmp_path / "whole", **options))
    app.train(settings(folder, data, tmp_path / "part", steps=2, **options))
    app.train(settings(folder, data, tmp_path / "part", resume=True, **options))
    adapters = [tensors_of(tmp_path / x / ADAPTER) for x in ("whole", "part")]
    assert_same_bits(*adapters)
    rows = [row for row in rows_of(tmp_path / "whole") if row["step"]]
    scales = [row["loss_scale"] for row in rows]
    assert scales == [x["loss_scale"] for x in rows_of(tmp_path / "part") if x["step"]]
    # A step is skipped if its gradient overflows. It has no norm, and halves the scale.
    is_skipped = [row["grad_norm"] is None for row in rows]
    halved = [x * 0.5**skip for x, skip in zip(scales, is_skipped, strict=True)]
    assert scales == [2.0**16, *halved[:-1]]
    assert whole.skipped == sum(is_skipped)
    skips = capsys.readouterr().err.count("its update is skipped")
    assert skips == 2 * whole.skipped  # of both runs


def test_cudnn_is_for_gpus_from_ampere_on():
    # The compute capabilities of a T4, A100, H100 and B200, of an MI300X, and of a CPU.
    capabilities = "7.5", "8.0", "9.0", "10.0", "gfx942", ""
    have = [has_flash_attention(x) for x in capabilities]
    assert have == [False, True, True, True, False, False]


SPLASH = dict(batch_size=8, attention="splash")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(target_modules=["q_prj"]),
            r"'q_prj' selects no module .Did you mean `q_proj`",
        ),
        (dict(target_modules="q_prj, v_proj"), "'q_prj' selects no module"),
        (dict(target_modules=".*layers.0.*"), "selects 1 of the 2 layers of"),
        (dict(target_modules="("), "regular expression"),
        (dict(block_size=100), "block_size"),
        (dict(max_length=5), "rows must have at most `max_length`"),
        (dict(warmup=6), "`warmup` must be at least 0 and less than the 6 steps"),
        (dict(data="nowhere.jsonl"), "nowhere"),
        (dict(validation_split=0.1), "left out for data with validation rows. Got 0.1"),
        (dict(validation_split=1.0), "`validation_split` must be between 0 and 1. Got"),
        (dict(keys={"prompt": "question"}), "line 1"),
        (dict(resume=True), "`out` must have a run to resume"),
        (dict(data="train.jsonl=1,valid.jsonl=0"), "each data set once, with a posit"),
        (dict(data="train.jsonl=1,train.jsonl=2"), "`data` must list each data set o"),
        (dict(keep_best=0), "`keep_best` must be true, false or a positive number"),
        (dict(keep_best=True, data="train.jsonl"), "`keep_best` needs validation rows"),
        (dict(log="wandb,tb"), "`log` must only contain .* Got .'tb'"),
        (dict(fmt="none", base_memory="host"), "`base_memory` must be device"),
        (dict(learning_rate="1e-3,3e-3"), "`learning_rate` must be a number. Got 1e-3"),
        (dict(learning_rate=-1.0), "must be positive and finite. Got"),
        (dict(seed="1.5"), "`seed` must be an integer"),
        # JAX uses the lower 32 bits of a seed.
        (dict(seed=2**32 + 1), r"`seed` must be from 0 to 2\*\*32 - 1. Got"),
        (dict(mesh="model=2"), "`mesh` must have positive sizes for some of data, fsd"),
        (dict(mesh="fsdp=2,fsdp=4"), "such as .*tensor=2.*. Got 'fsdp=2,fsdp=4'"),
        (dict(mesh="fsdp=0"), "Got 'fsdp=0'"),
        (dict(mesh="fsdp"), "Got 'fsdp'"),
        (dict(mesh="data=2,fsdp=3"), "`batch_size` must be a multiple of 6, the num"),
        (dict(mesh="fsdp=4"), "must have 8 devices, .* available. Got 4: fsdp=4"),
        (dict(mesh="tensor=8"), "must divide the 4 heads: it may be 1, 2, 4. Got 8"),
        (dict(mesh="fsdp=2,tensor=4"), "blocks of 64 along K = 64 must divide"),
        (
            dict(mesh="data=8", **SPLASH),
            "`attention` must be xla, blocks or cudnn without a TPU",
        ),
        (dict(attention="cudnn"), "xla or blocks without an NVIDIA GPU of .* and cpu"),
        (dict(distributed=True), "`mesh` must be given with `distributed`"),
        (dict(distributed="h:1,2", mesh="data=2"), "such as host0:9876,4,0. Got"),
    ],
)
def test_what_is_wrong_is_refused_before_the_model_is_read(
    folder, data, tmp_path, options, message, monkeypatch
):
    monkeypatch.setattr(OpenModel, "read", None)
    config = settings(folder, data, tmp_path / "run")
    monkeypatch.chdir(data)
    with pytest.raises(ValueError, match=message):
        app.train(app.TrainConfig.from_settings(config.to_settings() | options))
    assert not (tmp_path / "run").exists()


def test_batches_are_counted_without_being_made(folder, data, tmp_path, monkeypatch):
    def collate(*args):
        raise AssertionError("a batch was made")

    monkeypatch.setattr(batching, "collate", collate)
    for options in (dict(steps=None), dict(packing=True), dict(steps=3)):
        make_run(settings(folder, data, tmp_path / "run", **options), "2026-01-01")


def test_epochs_are_a_decimal_number_of_passes(folder, data, tmp_path):
    """In floats, 50 * 1.1 is 55.00000000000001."""
    text = (data / "valid.jsonl").read_text().splitlines()[0]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{text}\n" * 100)
    options = dict(steps=None, epochs=1.1, batch_size=2)
    config = settings(folder, rows, tmp_path / "run", **options)
    assert make_run(config, "2026-01-01").config.steps == 55


@pytest.mark.parametrize(
    "batch_size, accumulation, epochs, steps, count",
    [(2, 4, None, 2, 9), (8, 1, 10, 12, 90), (2, 1, 1.5, 7, 14), (100, 1, 2, 2, 18)],
)
def test_epochs_train_on_each_row_equally_often(
    folder, data, tmp_path, batch_size, accumulation, epochs, steps, count
):
    """The rows of all epochs are rounded up once, and the last step has the rest."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"a" * n}"}}\n' for n in range(1, 10)))
    options = dict(batch_size=batch_size, accumulation=accumulation)
    options |= dict(steps=None, epochs=epochs, max_length=16)
    run = make_run(settings(folder, rows, tmp_path / "run", **options), "2026-01-01")
    batches = [*make_batches(run.config, run.data)]
    assert run.config.steps == steps == math.ceil(len(batches) / accumulation)
    lengths = [n for x in batches for n in (x.segment_ids == 1).sum(axis=1) if n]
    assert len(lengths) == count
    times = [lengths.count(len(row.ids)) for row in run.data.train]
    assert max(times) - min(times) <= (epochs == 1.5)
    # A resumed run reads the settings that were written.
    (tmp_path / "run").mkdir()
    write_run_config(run.config, "a folder", None)
    again = make_run(read_run_config(tmp_path / "run" / "config.yaml"), "2026-01-01")
    assert again.fingerprint == run.fingerprint and again.config == run.config


@pytest.mark.parametrize("packing, size", [(False, 9), (True, 3)])
def test_a_batch_has_at_most_the_rows_of_an_epoch(
    folder, tmp_path, capsys, packing, size
):
    """9 rows of 2 to 10 tokens, which fill 3 rows of 20 tokens if packed."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"a" * n}"}}\n' for n in range(1, 10)))
    options = dict(batch_size=60, packing=packing, max_length=20, out=tmp_path / "run")
    run = make_run(settings(folder, rows, **options), "2026-01-01")
    assert run.config.batch_size == size
    batch = next(make_batches(run.config, run.data))
    assert (batch.segment_ids[:, 0] > 0).all() and len(batch.ids) == size
    assert f"`batch_size` is {size} instead of 60" in capsys.readouterr().err


@pytest.mark.slow
def test_an_epoch_trains_on_the_tokens_of_its_rows(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{"a" * n}"}}\n' for n in range(1, 10)))
    options = dict(batch_size=2, accumulation=4, steps=None, epochs=1, max_length=16)
    options["save_every"] = 1
    config = settings(folder, rows, tmp_path / "run", **options)
    assert app.train(config).steps == 2
    trained = [row for row in rows_of(tmp_path / "run") if row["step"]]
    # Each text has an end token, and its first token is no target.
    assert sum(row["tokens"] for row in trained) == sum(range(2, 11))
    assert sum(row["trained_tokens"] for row in trained) == sum(range(1, 10))
    shutil.rmtree(tmp_path / "run" / "state" / "2")
    assert app.train(config.replace(resume=True)).steps == 2
    assert [row for row in rows_of(tmp_path / "run") if row["step"]][1][
        "tokens"
    ] == trained[1]["tokens"]


def test_steps_and_epochs_must_agree(folder, data, tmp_path):
    options = dict(steps=5, epochs=2, batch_size=20)  # 40 rows
    assert make_run(
        settings(folder, data, tmp_path / "run", **options | {"steps": 4}), "2026-01-01"
    )
    with pytest.raises(ValueError, match="`steps` .* 4.* Got 5"):
        make_run(settings(folder, data, tmp_path / "run", **options), "2026-01-01")


@pytest.mark.parametrize(
    "options, every, chosen",
    [
        (dict(steps=200), 20, [2, 6]),
        (dict(steps=205, accumulation=2), 21, [1, 3, 5, 7]),
        (dict(steps=6), 1, [4]),
        (dict(steps=900), 90, []),  # all
        (dict(steps=200, eval_every=5), 5, [2, 6]),
    ],
)
def test_ten_evaluations_take_little_time(options, every, chosen):
    config = settings("model", "data", "out", **options)
    assert config.eval_steps == every
    trained = (config.steps or 0) * config.accumulation
    assert evaluation.sample_batches([*range(8)], trained) == chosen


@pytest.mark.parametrize(
    "out, resume, message",
    [
        (".", False, "`out` must be new or empty"),
        ("file", False, "`out` must be a folder"),
        (".", True, "which has no config.yaml"),
    ],
)
def test_a_folder_with_other_things_is_refused(
    folder, data, tmp_path, out, resume, message
):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=message):
        app.train(settings(folder, data, tmp_path / out, resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_runs_in_one_folder_are_refused(folder, data, tmp_path):
    with open_run_folder(str(tmp_path / "run"), resume=False):
        with pytest.raises(ValueError, match="Another run is using `out`"):
            app.train(settings(folder, data, tmp_path / "run"))
        code = (
            "from qlora_jax.llm.app.run_folder import open_run_folder\n"
            f"with open_run_folder({str(tmp_path / 'run')!r}, False): pass"
        )
        assert "Another run is using" in run_python("-c", code).stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_explodes_exits_with_the_step(folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--steps=9", "--batch-size=4", "--max-length=16", "--rank=1"]
    options += ["--learning-rate=1e38", "--warmup=0", "--save-every=5", "--chat=false"]
    options += ["--target-modules=[q_proj]", "--data", data / "train.jsonl"]
    arguments = "train", "--model", folder, "--out", out, *options
    status, output, error = commands.run(capsys, *arguments)
    assert status == 1 and output == "" and "Traceback" not in error
    assert "qlora-jax train: step 2 has loss nan" in error
    assert "No checkpoint exists" in error
    assert not [*(out / "state").iterdir()] and not (out / "adapter").exists()


@pytest.mark.slow
def test_a_process_trains_from_a_yaml_file(folder, data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {folder}\ndata: {data}\nout: nowhere\nsteps: 3\nbatch_size: 4\n"
        "target_modules: [q_proj, mlp.down_proj]\nrank: 2\nmax_length: 16\n"
        "chat: false\n"
    )
    arguments = "train", "--json", "--config", file, "--out", tmp_path / "run"
    done = run_python(*PROGRAM, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3 and done.stdout.count("\n") == 1
    assert "40 rows of prompt/completion and 6 for validation" in done.stderr
    assert "answers are exact" in done.stderr
    # Progress bars are for terminals only.
    assert re.search(r"step 2 of 3: loss .*, validation sample .* at", done.stderr)
    assert "it/s" not in done.stderr
    assert not [x for x in done.stderr.splitlines() if "\r" in x or "|" in x]
    # Only the first and the last evaluation use all validation rows.
    names = ("valid_sample_loss", "valid_loss", "valid_perplexity", "exact_match")
    logged = [[name in row for name in names] for row in rows_of(tmp_path / "run")]
    full_evaluation, sample_evaluation = [True] * 4, [True, False, False, False]
    assert logged == [
        full_evaluation,
        sample_evaluation,
        sample_evaluation,
        full_evaluation,
    ]
    adapter = ql.io.PeftConfig.read(tmp_path / "run" / "adapter")
    assert adapter.target_modules == ("down_proj", "q_proj")
    # The folder holds a run now. `--out` takes precedence over `out` in the file.
    status, output, _ = commands.run(capsys, *arguments, "--resume")
    assert status == 0 and json.loads(output)["steps"] == 3
    status, output, error = commands.run(capsys, *arguments)
    assert status == 1 and output == "" and "`out` must be new or empty" in error
    assert "Traceback" not in error and not (commands.ROOT / "nowhere").exists()


@pytest.mark.slow
def test_a_base_in_4_bits_trains_as_the_float_one_that_is_packed(
    folder, data, tmp_path
):
    packed = tmp_path / "packed"
    export(folder, "bitsandbytes", packed)
    results = {}
    for name, model in {"float": folder, "4 bit": packed}.items():
        rows, options = data / "train.jsonl", dict(steps=3, packing=True)
        config = settings(model, rows, tmp_path / name, **options)
        results[name] = app.train(config)
    assert_same_bits(*(tensors_of(results[x].adapter) for x in ("float", "4 bit")))
    with pytest.raises(ValueError, match="`fmt` must be none or nf4"):
        app.train(settings(packed, data, tmp_path / "other", fmt="int8"))


def check_export(folder, out, tmp_path):
    """Exports of the last state equal the adapter of the run; earlier ones differ."""

    def export_run(**overrides):
        return app.export(app.ExportConfig(run=str(out), **overrides))

    last, earlier = export_run(), str(tmp_path / "other")
    assert last.out == str(out / "adapter-6") and last.format == "peft"
    assert state_of(last.out).items() <= state_of(out / "adapter").items()
    export_run(step=4, out=earlier)
    changed = state_of(earlier).items() - state_of(last.out).items()
    assert [name for name, _ in changed] == ["adapter_model.safetensors"]
    export_run(format="merged", out=str(tmp_path / "one"))
    export(folder, "merged", tmp_path / "two", out / "adapter")
    assert state_of(tmp_path / "one") == state_of(tmp_path / "two")
    with pytest.raises(
        ValueError, match="`step` must be the step of a checkpoint .* Got 5"
    ):
        export_run(step=5, out=str(tmp_path / "five"))
    with pytest.raises(ValueError, match="`run` must be the folder of a run"):
        app.export(app.ExportConfig(run=earlier))


@pytest.mark.slow
def test_a_run_goes_on_from_an_earlier_state(folder, data, tmp_path, capsys):
    out = tmp_path / "run"
    config = settings(folder, data / "train.jsonl", out)
    app.train(config)
    adapter = (out / ADAPTER).read_bytes()
    check_export(folder, out, tmp_path)
    again = config.replace(resume=True)
    shutil.rmtree(out / "state" / "6")
    app.train(again)
    assert "Resuming after step 4 of 6\n" in capsys.readouterr().err
    assert (out / ADAPTER).read_bytes() == adapter
    # Without any state a run starts again, and prints a note.
    for step in ("4", "6"):
        shutil.rmtree(out / "state" / step)
    app.train(again)
    assert "run has no saved state. Training starts again" in capsys.readouterr().err
    assert (out / ADAPTER).read_bytes() == adapter
    assert [row["step"] for row in rows_of(out)] == list(range(1, 7))


@pytest.mark.slow
def test_the_adapter_is_the_best_one(folder, data, tmp_path, monkeypatch, capsys):
    losses, calls = iter([9.0, 5.0, 2.0, 3.0, 2.0, 2.5]), []

    def fake_mean(*arguments):
        return calls.append(len(arguments[-1])) or {"loss": next(losses)}

    monkeypatch.setattr(evaluation, "make_means", lambda loss: fake_mean)
    monkeypatch.setattr(ql.io, "fetch", lambda name: pathlib.Path(folder))
    out, options = tmp_path / "run", dict(keep_best=2)
    options |= dict(steps=30, eval_every=1, save_every=30, eval_examples=2)
    weights = f"{data}=3,{data / 'train.jsonl'}=1"
    config = settings("some/base", weights, out, **options)
    result = app.train(config)
    message = f"The validation loss of {out} has not fallen in 2 evaluations. Stopped "
    assert f"{message}after step 4.\n" in capsys.readouterr().err
    assert (result.steps, result.best_step, result.valid_loss) == (4, 2, 2.5)
    assert len(calls) == 6 and {*calls} == {2}  # the best state is evaluated again
    assert str(result).endswith(f"the adapter of step 2 is in {out}/adapter")
    assert sorted(path.name for path in (out / "state").iterdir()) == ["2", "4"]
    best = app.export(app.ExportConfig(run=str(out), step=2))
    assert_same_bits(*map(tensors_of, (best.out, result.adapter)))
    card = (out / "adapter" / "README.md").read_text()
    assert "| best step | 2 |" in card
    assert f"fine-tuned on {data.name} and train.jsonl" in card
    reweighted = config.replace(data=weights.replace("=3,", "=2,"), resume=True)
    with pytest.raises(ValueError, match=r"rows and weights was \[\[40, 3.0\], .* is"):
        app.train(reweighted)


@pytest.mark.slow
def test_a_run_that_is_sent_a_signal_saves_its_state(folder, data, tmp_path, capsys):
    out, rows, file = tmp_path / "run", data / "train.jsonl", tmp_path / "run.yaml"
    endless = settings(folder, rows, out, steps=10**5, save_every=10**5)
    file.write_text(yaml.safe_dump(endless.to_settings()))
    arguments = "train", "--config", file
    process = commands.start_python(
        *PROGRAM, *arguments, stderr=subprocess.PIPE, text=True
    )
    metrics = out / "metrics.jsonl"
    while not (metrics.is_file() and len(read_metrics(metrics)) >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in error
    step = read_metrics(metrics)[-1]["step"]
    assert 3 <= step < 10**5
    config = out / "config.yaml"
    assert error.endswith(
        f"The state of step {step:,} is saved in {out}/state. To resume: qlora-jax "
        f"train --config {config} --resume\n"
    )
    assert [path.name for path in (out / "state").iterdir()] == [str(step)]
    # The adapter of this state can be exported.
    status, output, _ = commands.run(capsys, "export", "--run", out)
    assert status == 0 and f"{out}/adapter-{step}: peft" in output
    assert ql.io.PeftConfig.read(out / f"adapter-{step}").r == 4


def test_each_process_of_a_run_can_resume_it(tmp_path, capsys):
    devices = dict(mesh="data=2", distributed="host:1234,2,1")
    config = settings("model", "data", tmp_path / "run", **devices)
    file = tmp_path / "run" / "config.yaml"
    file.parent.mkdir()
    write_run_config(config, "here", None)
    stop = StopAtSignal()
    stop.number = signal.SIGTERM
    with pytest.raises(SystemExit):
        _end_at_signal(stop, 3, config)
    command = f"qlora-jax train --config {file} --resume"
    command += " --distributed host:1234,2,INDEX"
    assert f"To resume: {command}, in each process" in capsys.readouterr().err
    arguments = shlex.split(command.replace("INDEX", "1"))[1:]
    assert parse(arguments)[1] == config.replace(resume=True)


def test_a_damaged_file_of_settings_is_reported_first(data, tmp_path):
    (tmp_path / "config.yaml").write_text("model: [")
    config = settings("nowhere", data, tmp_path, resume=True)
    with pytest.raises(ValueError, match="config.yaml cannot be read"):
        app.train(config)


# Sends two signals, the second one while the main thread is in an endless call.
SIGNALS = """
import hashlib, os, signal, threading, time
from qlora_jax.llm.app.processes import catch_signals
from qlora_jax.llm.app.training.program import make_program

def send():
    os.kill(os.getpid(), signal.SIGINT)
    while not stop.is_due():
        time.sleep(0.01)
    print(stop.number == signal.SIGINT, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGINT, signal.default_int_handler)
with catch_signals() as stop:
    threading.Thread(target=send, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_signal_ends_at_once():
    done = run_python("-c", SIGNALS, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "True\n" and "SIGINT: the run stops after this" in done.stderr


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, in background jobs of a shell too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_are_as_before_behind_a_run(interruptible):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), catch_signals() as stop:
        assert not stop.is_due()
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 60
        while not stop.is_due():
            assert time.monotonic() < end
            time.sleep(0.001)
        stop.raise_exception()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
def test_choices_for_memory_train_as_the_plain_run(folder, data, tmp_path):
    """The run uses DoRA, whose norms read the packed weights too, and trains norms."""

    def train(out, **options):
        options |= dict(eval_examples=0, steps=3, use_dora=True)
        options |= dict(trainable=".*norm/scale")
        app.train(settings(folder, data / "train.jsonl", tmp_path / out, **options))
        return losses(tmp_path / out)

    got = train("small", remat="offload", mlp_tile=5, base_memory="host")
    assert_close(got, train("plain"))
    names = ql.io.open_safetensors(tmp_path / "small" / "adapter")
    assert any("lora_magnitude_vector" in name for name in names)
