"""`train --scales search`, and `export --scales search --calibrate DATA`."""

import functools
import json

import numpy as np
import pytest
from commands import rows_of, settings, write_letters
from commands import run as run_command
from helpers import refusal
from tolerances import assert_close, rounding

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.base_model import LAYERS, open_model
from qlora_jax.llm.app.calibrating import make_calibrator
from qlora_jax.llm.data import open_tokenizer, read_rows
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.tiny import save_tiny

OPTIONS = dict(chat=True, max_length=64, eval_examples=0, fmt="int4_f16")
RUN = OPTIONS | dict(scales="search", steps=4, save_every=2)
SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
Q_PROJ = "layers/self_attn/q_proj/kernel"
# With noise, other weights would be rounded to another code.
without_noise = pytest.mark.without_noise


def run(capsys, *arguments):
    """Runs a command with `--json`; returns its status, its JSON and its stderr."""
    status, out, err = run_command(capsys, *arguments, "--json")
    return status, json.loads(out) if out else None, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model whose sizes are multiples of all blocks, and data."""
    folder = tmp_path_factory.mktemp("scales")
    save_tiny(folder / "base", num_key_value_heads=4, **SIZES)
    return write_letters(folder)


@pytest.fixture(scope="module")
def searched(folder):
    """A run whose base is packed with searched scales."""
    app.train(settings(folder / "base", folder, folder / "run", **RUN))
    return folder / "run"


def tokens_of(model, data):
    """Returns the rows of a file as tokens."""
    tokenizer = open_tokenizer(model.path)
    return read_rows(str(data), tokenizer, vocab_size=model.engine.vocab_size)


def packed_leaves(tree):
    return {k: x for k, x in ql.leaves_by_path(tree).items() if ql.is_packed(x)}


def assert_same(path, expected):
    """Asserts that a model on disk has the packed weights of a tree."""
    got = packed_leaves(open_model(str(path)).read(progress=False).base)
    expected = packed_leaves(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        # Files in E2M1 are decoded to bfloat16.
        decoded = np.asarray(ql.dequantize(leaf)).astype(got[name].dtype)
        np.testing.assert_array_equal(ql.dequantize(got[name]), decoded)


@pytest.mark.slow
@without_noise
def test_all_commands_pack_the_base_of_a_run_alike(folder, searched, capsys):
    trained = rows_of(searched)[-1]["valid_loss"]
    score = ["score", "--data", folder / "valid.jsonl"]
    scored = run(capsys, *score, "--run", searched)[1]["loss"]
    assert abs(scored / trained - 1) < rounding(128)
    # The same adapter, beside a base whose scales follow the rule of the format.
    source = ["--model", folder / "base", "--adapter", searched / "adapter"]
    by_rule = run(capsys, *score, *source, "--fmt=int4_f16", "--scales=absmax")
    assert abs(by_rule[1]["loss"] / trained - 1) > 1e-4
    assert "The base here is a different one" in by_rule[2]
    # The base of the run, decoded into a file of floats.
    _, params = load(folder / "base", "float32", progress=False)
    config = ql.QLoRAConfig(fmt="int4_f16", scales="search", targets=LAYERS)
    packed = ql.quantize(params, config)
    lora = ql.io.load_peft(
        searched / "adapter", packed, open_model(str(folder / "base")).names
    )[1]
    merged = ql.leaves_by_path(ql.merge(packed, lora))
    export = ["export", "--format=merged", "--run", searched]
    run(capsys, *export, "--out", folder / "merged")
    _, written = load(folder / "merged", "float32", progress=False)
    for path, leaf in ql.leaves_by_path(written).items():
        assert_close(leaf, merged[path])


@pytest.mark.slow
def test_a_resumed_run_keeps_its_scales(folder, searched, tmp_path):
    def train(**options):
        config = settings(folder / "base", folder, tmp_path / "run", **RUN | options)
        return app.train(config)

    train(steps=2)
    refusal(lambda: train(steps=4, resume=True, scales="absmax"), "scales")
    train(steps=4, resume=True)
    assert rows_of(tmp_path / "run")[-1]["valid_loss"] == pytest.approx(
        rows_of(searched)[-1]["valid_loss"], rel=rounding(128)
    )


@without_noise
@pytest.mark.slow
def test_a_merge_aware_adapter_has_the_scales_of_its_run(folder, tmp_path, capsys):
    options = dict(fmt="none", merge_aware=True, target_fmt="q4_0", scales="search")
    options |= dict(target_modules="all-linear")
    run_folder = tmp_path / "run"
    config = settings(folder / "base", folder, run_folder, **OPTIONS | options)
    trained = app.train(config).valid_loss
    data = ["--data", folder / "valid.jsonl"]
    written = run(capsys, "export", "--run", run_folder, *data)[1]
    assert written["format"] == "gguf"
    assert abs(written["losses"]["file"] / trained - 1) < rounding(128)
    options = ["--format=gguf", "--gguf-type=Q4_0", "--scales=search"]
    command = ["export", "--run", run_folder, "--out", tmp_path / "x.gguf", *options]
    _, _, err = run(capsys, *command)
    assert "exactly the weights of training. Got 'search'." in err


def export_command(folder, out, form, fmt, *options):
    """Returns a command, and how it packs."""
    command = ["export", "--model", folder / "base", "--format", form, "--out", out]
    settings = dict(fmt=fmt, scales="search", targets=LAYERS)
    names = {"gguf": "--gguf-type=Q4_0", "bitsandbytes": f"--fmt={fmt}"}
    command += [names[form]] if form in names else []
    return [*command, "--scales=search", *options], ql.QLoRAConfig(**settings)


@pytest.mark.slow
@without_noise
@pytest.mark.parametrize(
    "form, fmt",
    [
        ("nvfp4", "nvfp4"),
        ("bitsandbytes", "nf4"),
        ("bitsandbytes", "fp4"),
        ("compressed-tensors", "int4_f16"),
        ("mxfp4", "mxfp4"),
        ("gguf", "q4_0"),
    ],
)
def test_a_packed_file_is_that_of_the_functions(folder, tmp_path, capsys, form, fmt):
    out, data = tmp_path / f"out{'.gguf' * (form == 'gguf')}", folder / "train.jsonl"
    options = form, fmt, "--calibrate", data
    command, config = export_command(folder, out, *options)
    status, _, err = run(capsys, *command)
    assert status == 0, err
    model = open_model(str(folder / "base"))
    params = model.read(progress=False).base
    importance = make_calibrator(model, tokens_of(model, data))(params)
    expected = ql.quantize(params, config, importance=importance)
    assert_same(out, expected)
    # The importance has an effect.
    by_path = map(ql.leaves_by_path, (expected, ql.quantize(params, config)))
    weighted, unweighted = (tree[Q_PROJ].codes for tree in by_path)
    assert not np.array_equal(weighted, unweighted)


@without_noise
@pytest.mark.slow
@pytest.mark.parametrize("form, fmt", [("bitsandbytes", "nf4"), ("gguf", "q4_0")])
def test_a_merged_adapter_is_calibrated_too(
    folder, searched, tmp_path, capsys, form, fmt
):
    out, data = tmp_path / f"out{'.gguf' * (form == 'gguf')}", folder / "train.jsonl"
    adapter = searched / "adapter"
    options = form, fmt, "--calibrate", data, "--adapter", adapter
    command, config = export_command(folder, out, *options)
    status, _, err = run(capsys, *command)
    assert status == 0, err
    model = open_model(str(folder / "base"), str(adapter)).read(progress=False)
    merged = ql.merge(model.base, model.lora)
    importance = make_calibrator(model, tokens_of(model, data))(merged)
    assert_same(out, ql.quantize(merged, config, importance=importance))


@without_noise
def test_a_search_without_data_gives_the_files_of_the_functions(
    folder, tmp_path, capsys
):
    command, config = export_command(folder, tmp_path / "x.gguf", "gguf", "q4_0")
    status, _, err = run(capsys, *command)
    assert status == 0, err
    params = open_model(str(folder / "base")).read(progress=False).base
    assert_same(tmp_path / "x.gguf", ql.quantize(params, config))


def test_inputs_are_measured_on_every_token(folder, tmp_path):
    # The rows have 1,200 tokens, so that one of them is in two batches, and the tokens
    # that do not fill a batch are left out.
    ids = np.random.default_rng(0).integers(0, 64, (30, 40))
    rows = "".join(json.dumps({"input_ids": x.tolist()}) + "\n" for x in ids)
    (tmp_path / "rows.jsonl").write_text(rows)
    model = open_model(str(folder / "base"))
    params = model.read(progress=False).base
    importance = make_calibrator(model, tokens_of(model, tmp_path / "rows.jsonl"))(
        params
    )
    # The first layer gets normalized embeddings.
    embedded = np.asarray(params["embed_tokens"]["embedding"], np.float64)
    embedded = embedded[ids.reshape(-1)[:1024]]
    squares = np.square(embedded)
    squares /= squares.mean(-1, keepdims=True) + 1e-5
    scale = np.asarray(params["layers"]["input_layernorm"]["scale"][0], np.float64)
    expected = squares.mean(0) * np.square(scale)
    got = ql.leaves_by_path(importance)[Q_PROJ][0]
    assert_close(got, np.float32(expected), 1024)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(format="merged", calibrate="x"), "`calibrate` must be left out unless"),
        (dict(format="peft", scales="search"), "`scales` must be left out unless"),
        (dict(format="nvfp4", calibrate="x"), "must be search with `calibrate`"),
        (
            dict(format="gguf", scales="search", calibrate="x"),
            "`gguf_type` must be Q4_0 with `calibrate`",
        ),
        (
            dict(format="gguf", gguf_type="Q4_K_M", scales="search"),
            "`scales` must be left out with `gguf_type` Q4_K_M",
        ),
        (dict(server="vllm", scales="search", calibrate="x"), "Got 'x' for vllm."),
    ],
)
def test_what_cannot_use_a_search_refuses_it(options, reason):
    refusal(
        lambda: app.ExportConfig(model="base", adapter="adapter", out="out", **options),
        reason,
    )


def test_stored_codes_refuse_a_search(folder, tmp_path, capsys):
    packed = ["--format=mxfp4", "--out", tmp_path / "packed"]
    run(capsys, "export", "--model", folder / "base", *packed)
    source = ["--model", tmp_path / "packed", "--scales=search"]
    again = ["export", *source, "--format=mxfp4", "--out", tmp_path / "again"]
    assert "weights are in this format already" in run(capsys, *again)[2]
    score = ["score", *source, "--data", folder / "valid.jsonl"]
    assert "`scales` must be left out unless training packed" in run(capsys, *score)[2]
    for options in (dict(fmt="none"), dict(fmt=None, model=tmp_path / "packed")):
        base = options.pop("model", folder / "base")
        config = settings(base, folder, tmp_path / "run", **RUN | options)
        reason = "`scales` must be absmax unless training packs"
        refusal(functools.partial(app.train, config), reason)
