"""Commands that use the adapter of a run use the weights and the format of its base."""

import json
import pathlib
import shutil

import gguf
import ml_dtypes
import numpy as np
import pytest
import yaml
from commands import run, settings, write_letters
from helpers import TABLES, assert_same_bits, quantize, relative_error, rounding
from stored import export, tensors_of
from tokenizer_helpers import write_rows

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.as_trained import (
    open_model_for,
    read_as_trained,
    run_config_of,
    training_load_options,
)
from qlora_jax.llm.models.tiny import save_tiny

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
DOWN = "model.layers.1.mlp.down_proj.weight"


def open_for(config):
    """Returns a config's model, and the options to read it as training did."""
    model = open_model_for(config)
    return model, training_load_options(config, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model, data, and a run on it in nf4."""
    folder = tmp_path_factory.mktemp("bases")
    save_tiny(folder / "base", tie_word_embeddings=False)
    write_letters(folder)
    packing = dict(fmt="nf4", block_size=64, double_quant=False)
    config = settings(
        folder / "base", folder / "train.jsonl", folder / "run", **packing
    )
    app.train(config)
    return folder


@pytest.fixture(scope="module")
def merged(folder):
    """The adapter added with NumPy to the float weights and to the weights in nf4."""
    adapter = tensors_of(folder / "run" / "adapter")
    raw = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    floats = tensors_of(folder / "base")
    packed = dict(floats)
    for name in [name for name in floats if name.endswith("_proj.weight")]:
        codes, scales = quantize(np.float32(floats[name].T), "nf4", 64)
        packed[name] = (TABLES["nf4"][codes] * np.repeat(scales, 64, axis=0)).T
        a, b = (
            adapter.get(f"base_model.model.{name[:-7]}.lora_{x}.weight") for x in "AB"
        )
        if a is not None:
            change = raw["lora_alpha"] / raw["r"] * b @ a
            floats[name], packed[name] = floats[name] + change, packed[name] + change
    return {"none": floats, "nf4": packed}


def is_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    return all(
        relative_error(x, expected[k]) < rounding(64) for k, x in tensors.items()
    )


@pytest.mark.parametrize("fmt", ["nf4", "none"])
@pytest.mark.parametrize("source_kind", ["run", "adapter"])
def test_merged_models_have_the_base_of_the_run(
    folder, merged, tmp_path, capsys, fmt, source_kind
):
    out = tmp_path / "merged"
    source = ["--run", folder / "run"]
    if source_kind == "adapter":
        source = ["--model", folder / "base", "--adapter", folder / "run" / "adapter"]
    options = ["--fmt=none"] * (fmt == "none")
    command = ["export", *source, "--format=merged", "--out", out, *options]
    status, _, err = run(capsys, *command)
    assert status == 0 and is_equal(tensors_of(out), merged[fmt])
    other_fmt = {"nf4": "none", "none": "nf4"}[fmt]
    assert not is_equal(tensors_of(out), merged[other_fmt])
    assert ("was trained on" in err and " with fmt nf4." in err) == (fmt == "none")
    # Packing weights in nf4 with a small change again would undo the change.
    assert ("export with `--fmt none`" in err) == (fmt == "nf4")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_gguf_and_mlx_have_it_too(folder, merged, tmp_path, capsys):
    source = ["export", "--run", folder / "run"]
    file, out = tmp_path / "model.gguf", tmp_path / "served"
    to_file = ["--format=gguf", "--tokenizer=false", "--out", file]
    assert run(capsys, *source, *to_file)[0] == 0
    stored = {x.name: x.data for x in gguf.GGUFReader(str(file)).tensors}
    down = np.float32(stored["blk.1.ffn_down.weight"])
    half = np.finfo(np.float16).eps
    assert relative_error(down, merged["nf4"][DOWN]) < half
    assert relative_error(down, merged["none"][DOWN]) > 10 * half
    assert run(capsys, *source, "--for=mlx", "--out", out)[0] == 0
    assert is_equal(tensors_of(out / "model"), merged["nf4"])
    # Exports to 4 bits merge the adapter into the float weights, and print a note.
    packed = ["--format=bitsandbytes", "--out", tmp_path / "packed"]
    status, _, err = run(capsys, *source, *packed)
    assert status == 0 and "note: the adapter was trained on nf4. It is merged" in err


@pytest.fixture(scope="module")
def models(folder, merged):
    """Folders of the merged models."""
    for fmt, tensors in merged.items():
        out = shutil.copytree(folder / "base", folder / fmt)
        ql.io.write_safetensors(out / "model.safetensors", tensors)
    return folder


@pytest.mark.slow
def test_scores_are_those_of_the_base_of_the_run(models, capsys):
    base, adapter = ["--model", models / "base"], models / "run" / "adapter"
    command = ["score", "--data", models / "valid.jsonl", "--chat=false", "--json"]

    def score(*options):
        status, out, err = run(capsys, *command, *options)
        assert status == 0
        return json.loads(out)["loss"], err

    merged_losses = {fmt: score("--model", models / fmt)[0] for fmt in ("nf4", "none")}
    assert abs(merged_losses["nf4"] - merged_losses["none"]) > 1e-4

    def is_near(loss, fmt):
        return abs(loss / merged_losses[fmt] - 1) < rounding(128)

    for options in (["--run", models / "run"], [*base, "--adapter", adapter]):
        loss, err = score(*options)
        assert is_near(loss, "nf4") and err == ""
        loss, err = score(*options, "--fmt=none")
        assert is_near(loss, "none") and err.startswith("note: ")
    # A base is recognized by its name alone, so that a renamed copy gives a note.
    shutil.copytree(models / "base", models / "renamed")
    _, err = score("--model", models / "renamed", "--adapter", adapter)
    assert err.startswith(f"note: {models / 'run'} was trained on {models / 'base'}")
    # The base of an adapter outside of its run's folder is unknown.
    shutil.copytree(adapter, models / "moved" / "adapter")
    loss, err = score(*base, "--adapter", models / "moved" / "adapter")
    assert is_near(loss, "none") and err == ""


def test_the_dtype_of_a_run_rounds_weights_before_they_are_packed(models):
    run = models / "rounded"
    shutil.copytree(models / "run" / "adapter", run / "adapter")
    text = (models / "run" / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("float32", "bfloat16"))
    adapter = str(run / "adapter")
    for fmt in (None, "nf4"):  # also if the format of the run is requested
        config = app.ScoreConfig(str(models / "base"), "d", adapter, fmt=fmt)
        base = read_as_trained(*open_for(config), "float32").base
        w = tensors_of(models / "base")[DOWN].T.astype(ml_dtypes.bfloat16)
        codes, scales = quantize(np.float32(w), "nf4", 64)
        kernel = base["layers"]["mlp"]["down_proj"]["kernel"]
        expected = TABLES["nf4"][codes] * np.repeat(scales, 64, axis=0)
        decoded = np.float32(ql.dequantize(kernel)[1])
        assert_same_bits(decoded, np.float32(expected.astype(ml_dtypes.bfloat16)))
        assert base["embed_tokens"]["embedding"].dtype == np.float32


@pytest.mark.slow
def test_answers_are_those_of_the_base_of_the_run(models, capsys):
    adapter = ["--model", models / "base", "--adapter", models / "run" / "adapter"]
    command = ["generate", "--prompt=ab=", "--chat=false", "--max-new-tokens=8"]
    texts = {
        name: run(capsys, *command, *options)[:2]
        for name, options in {
            "NumPy": ["--model", models / "nf4"],
            "run": ["--run", models / "run"],
            "settings": ["--config", models / "run" / "config.yaml"],
            "adapter": adapter,
        }.items()
    }
    assert len({*texts.values()}) == 1 and texts["run"][0] == 0


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt=p"],
        ["score", "--data=d"],
        ["generate", "--prompt=p", "--run=r", "--adapter=a"],
        ["score", "--run=r"],
    ],
)
def test_a_run_and_what_it_replaces(capsys, command):
    with pytest.raises(SystemExit):
        run(capsys, *command)
    assert "must be" in capsys.readouterr().err


def test_an_adapter_has_its_run_in_the_current_folder_too(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    config = app.ScoreConfig(str(folder / "base"), "d", adapter="~/run/adapter")
    assert run_config_of(config) is not None
    monkeypatch.chdir(folder / "run" / "adapter")
    config = app.ScoreConfig(str(folder / "base"), "d", adapter=".")
    packing = open_for(config)[1]["packing_config"]
    assert (packing.fmt, packing.block_size, packing.double_quant) == ("nf4", 64, False)


def test_an_adapter_is_not_read_without_the_damaged_settings_of_its_run(
    folder, tmp_path
):
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("model: m\nfmt: nf5")
    adapter = str(tmp_path / "run" / "adapter")
    config = app.ScoreConfig(str(folder / "base"), "d", adapter)
    with pytest.raises(ValueError, match="config.yaml cannot be read"):
        open_for(config)
    (tmp_path / "run" / "metrics.jsonl").unlink()  # then it is another program's folder
    assert open_for(config)[1] == {}


def test_options_of_the_model_replace_those_of_the_run(folder, tmp_path):
    source = dict(data="d", run=str(folder / "run"))
    config = app.ScoreConfig(fmt="int4", **source)
    assert open_for(config)[1]["packing_config"].fmt == "int4"
    packed = str(tmp_path / "packed")
    export(folder / "base", "bitsandbytes", packed)
    with pytest.raises(ValueError, match="`fmt` must be none or nf4, .* Got 'int4'"):
        open_for(app.ScoreConfig(packed, fmt="int4", **source))


def test_a_run_writes_no_adapter_without_a_tokenizer(folder, tmp_path):
    source = dict(run=str(folder / "run"), out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="`tokenizer` must be left out .* for peft"):
        app.export(app.ExportConfig(tokenizer=False, **source))


def test_a_format_is_needed_for_its_options(folder, capsys):
    options = ["--run", folder / "run", "--data", folder / "valid.jsonl"]
    status, _, err = run(capsys, "score", *options, "--block-size=32")
    assert status == 1 and "`fmt` must be given with `block_size`" in err
    options = ["--model", folder / "base", "--data", folder / "valid.jsonl"]
    status, _, err = run(capsys, "score", *options, "--fmt=none", "--block-size=32")
    assert status == 1 and "`fmt` must be given with `block_size`" in err


@pytest.mark.slow
def test_an_adapter_names_the_commit_of_its_base(folder, tmp_path, monkeypatch):
    """As PEFT does: its AutoPeftModel loads the base at the adapter's `revision`."""
    snapshot = tmp_path / "0123abc"  # as the hub's cache names folders
    shutil.copytree(folder / "base", snapshot)

    def fetch_from_hub(name):
        return snapshot if name == SMOLLM2 else pathlib.Path(name)

    monkeypatch.setattr(ql.io, "fetch", fetch_from_hub)
    rows = write_rows(tmp_path / "d.jsonl", [{"input_ids": [3, 4, 5, 6]}] * 4)
    out = tmp_path / "run"
    app.train(settings(SMOLLM2, rows, out, steps=1, save_every=1, warmup=0))
    for form in ("peft", "peft-portable"):
        app.export(app.ExportConfig(None, form, str(tmp_path / form), run=str(out)))
        export(SMOLLM2, form, tmp_path / f"again {form}", out / "adapter")
    written = [out / "adapter", *tmp_path.glob("*peft*")]
    assert len(written) == 5
    for adapter in written:
        raw = json.loads((adapter / "adapter_config.json").read_text())
        assert (raw["base_model_name_or_path"], raw["revision"]) == (SMOLLM2, "0123abc")
    raw = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert raw["revision"] is None  # of local files


@pytest.mark.slow
def test_an_adapter_of_local_files_is_not_pushed(folder, tmp_path, monkeypatch):
    """Readers could not load the weights that it is trained on."""

    def fail_push(*arguments):
        return pytest.fail("it was pushed")

    monkeypatch.setattr("qlora_jax.llm.app.commands.export.push", fail_push)
    base, out = str(folder / "base"), str(folder / "run")
    for model in (None, SMOLLM2):
        config = app.ExportConfig(model, run=out, push_to_hub="some/new")
        with pytest.raises(ValueError, match=f"Got one that is trained on {base}, "):
            app.export(config)


MESSAGES = [
    {"role": role, "content": text}
    for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
]


def run_with(folder, tmp_path, **settings):
    """Returns a copy of the run, with other settings of its rows.

    The template writes a letter for each message, and marks what is to be trained.
    """
    (tmp_path / "marked.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '!' if loop.last }}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    out = shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copyfile(tmp_path / "marked.jinja", out / "template.jinja")
    written = yaml.safe_load((out / "config.yaml").read_text())
    written |= {"template": "a-path-on-another-machine.jinja"} | settings
    (out / "config.yaml").write_text(yaml.safe_dump(written))
    return out


@pytest.mark.parametrize(
    "settings, row, num_trained",
    [
        ({"train_on": "last"}, {"messages": MESSAGES}, 3),  # !d and an end token
        # a, b, an end token, c, !d and an end token, without the first
        ({"train_on": "all"}, {"messages": MESSAGES}, 6),
        ({"keys": {"messages": "talk"}}, {"talk": MESSAGES}, 5),
        # With `chat`, rows become messages, and the template adds "!".
        ({"chat": True}, {"prompt": "a", "completion": "b"}, 3),
        ({"chat": False}, {"prompt": "a", "completion": "b"}, 2),
        # The rows of preferences have other keys and targets.
        ({"objective": "orpo", "train_on": "all"}, {"messages": MESSAGES}, 5),
    ],
)
def test_rows_are_scored_with_the_settings_of_the_run(
    folder, tmp_path, settings, row, num_trained
):
    out = run_with(folder, tmp_path, **settings)
    rows = str(write_rows(tmp_path / "rows.jsonl", [row]))
    assert app.score(app.ScoreConfig(run=str(out), data=rows)).tokens == num_trained
    # The same settings as options, for an adapter that is not in the folder of a run.
    adapter = str(shutil.copytree(out / "adapter", tmp_path / "adapter"))
    options = dict(template=str(tmp_path / "marked.jinja")) | settings
    if options.pop("objective", None):
        del options["train_on"]
    config = app.ScoreConfig(str(folder / "base"), rows, adapter, **options)
    assert app.score(config).tokens == num_trained


def test_the_chat_template_is_that_of_the_run(folder, tmp_path):
    """Without its marks, the first of several answers could not be found."""
    out = run_with(folder, tmp_path)
    path = tmp_path / "marked.jinja"
    rows = str(write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES}]))
    score = app.score(app.ScoreConfig(run=str(out), data=rows))
    assert score.tokens == 5  # b and !d, each with an end token
    options = dict(adapter=str(out / "adapter"), template=str(path))
    assert app.score(app.ScoreConfig(str(folder / "base"), rows, **options)) == score
    # The prompt consists of the single letter that this template writes.
    options = dict(prompt="a", max_new_tokens=1)
    [answer] = app.generate(app.GenerateConfig(run=str(out), **options)).answers
    assert answer.prompt_tokens == 1
    (out / "template.jinja").unlink()
    message = "`template` must be a file. .*run/template.jinja"
    with pytest.raises(ValueError, match=message):
        app.score(app.ScoreConfig(run=str(out), data=rows))


@pytest.mark.slow
def test_dtypes_of_a_run_in_bfloat16(folder, tmp_path, capsys):
    options = dict(fmt="nf4", dtype="bfloat16", steps=2, eval_examples=0)
    out = tmp_path / "run"
    config = settings(folder / "base", write_letters(tmp_path), out, **options)
    loss = app.train(config).valid_loss
    # Merged tensors have the dtype of the run, and not that of the file of floats.
    export = ["export", "--run", out, "--format=merged", "--out"]
    for dtype, flags in (("bfloat16", []), ("float32", ["--dtype=float32"])):
        assert run(capsys, *export, tmp_path / dtype, *flags)[0] == 0
        assert {str(x.dtype) for x in tensors_of(tmp_path / dtype).values()} == {dtype}
    with pytest.raises(SystemExit):
        run(capsys, "export", "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "By default, the dtype of the run if training packed the model" in words
    # So does the loss of `score`, if it computes in this dtype.
    source = dict(run=str(out), data=str(tmp_path / "valid.jsonl"))
    errors = {
        dtype: abs(app.score(app.ScoreConfig(dtype=dtype, **source)).loss - loss)
        for dtype in ("bfloat16", "float32")
    }
    assert errors["bfloat16"] < errors["float32"] and errors["bfloat16"] < 1e-3 * loss


def test_the_system_message_that_all_rows_share_is_used_again(folder, tmp_path, capsys):
    system = "Answer \x1b[1mbriefly."
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": [{"role": "system", "content": system}, *turns]},
        {"messages": turns, "system": system},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "run"
    options = dict(steps=2, eval_examples=0, fmt="none", max_length=64)
    app.train(settings(folder / "base", data, out, **options))

    def num_tokens(**options):
        options = dict(run=str(out), prompt="a", max_new_tokens=1) | options
        [answer] = app.generate(app.GenerateConfig(**options)).answers
        return answer.prompt_tokens, capsys.readouterr().err

    tokens, note = num_tokens()
    expected, no_note = num_tokens(system=system)
    assert tokens == expected and repr(system) in note and repr(system) not in no_note
    without, note = num_tokens(system="")
    assert without < tokens and "system message" not in note
    assert num_tokens(chat=False)[0] < without

    written = app.export(
        app.ExportConfig(run=str(out), server="vllm", out=str(tmp_path / "served"))
    )
    assert json.dumps(system) in str(written).splitlines()[-1]

    # Rows with different messages have none in common.
    mixed = write_rows(tmp_path / "mixed.jsonl", [*rows, {"messages": turns}])
    other = tmp_path / "other"
    app.train(settings(folder / "base", mixed, other, **options))
    assert num_tokens(run=str(other))[0] == without
