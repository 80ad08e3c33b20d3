"""The command line: its results, its exit status, what it prints where."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import qlora_jax as ql
from qlora_jax import cli
from qlora_jax.cli.main import COMMANDS, main
from qlora_jax.models.checkpoint import abstract_params, load
from qlora_jax.models.decoder_names import decoder_names
from qlora_jax.models.families import config_from_hf
from qlora_jax.models.tiny import save_tiny
from qlora_jax.models.tokenizer import load_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "models" / "llama_tied"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROWS = [{"input_ids": list(range(3, 21))}, {"input_ids": [5, 9, 2, 11, 30, 7, 8]}]
MODULES = ("self_attn.q_proj", "mlp.down_proj")


def run(capsys, *arguments):
    """Runs a command in this process: its status, its JSON, its errors."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "base"
    folder.mkdir()
    config = config_from_hf(CONFIG)
    names, rng = decoder_names(config), np.random.default_rng(0)
    tensors = {}
    for path, leaf in _by_path(abstract_params(config)).items():
        batch = leaf.shape[: names.num_batch_axes(path)]
        shape = leaf.shape[len(batch) :]
        shape = shape[::-1] if names.roles(path) else shape
        for name in names.of(path, batch).flat:
            x = 0.3 * rng.normal(size=shape)
            tensors[name] = (x if len(shape) > 1 else 1 + x).astype(np.float32)
    ql.io.write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocab = {f"w{i}": i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _by_path(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    spell = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    return {spell(keys): leaf for keys, leaf in found}


@pytest.fixture(scope="module")
def adapter(folder):
    """An adapter of PEFT; returns its folder and its factors with their scalings."""
    path, rng, factors = folder.parent / "adapter", np.random.default_rng(1), {}
    path.mkdir()
    tensors = ql.io.open_safetensors(folder)
    for name in tensors:
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            n, k = tensors[name].shape
            a, b = (0.2 * rng.normal(size=s).astype("f") for s in ((4, k), (n, 4)))
            factors[module] = a, b, 0.75 if "0.self_attn.q_proj" in module else 2
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    settings["alpha_pattern"] = {"layers.0.self_attn.q_proj": 3}
    settings["target_modules"] = ["q_proj", "down_proj"]
    (path / "adapter_config.json").write_text(json.dumps(settings))
    stored = {}
    for module, (a, b, _) in factors.items():
        stored[f"base_model.model.{module}.lora_A.weight"] = a
        stored[f"base_model.model.{module}.lora_B.weight"] = b
    ql.io.write_safetensors(path / "adapter_model.safetensors", stored)
    return path, factors


@pytest.fixture(scope="module")
def rows(folder):
    return write_rows(folder.parent / "rows.jsonl", ROWS)


def test_score_is_the_mean_of_the_tokens_that_count(capsys, tmp_path):
    golden = np.load(GOLDEN / "golden.npz")
    tokens, logits = golden["tokens"], golden["logits"].astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1))[:, :-1] - np.take_along_axis(
        logits[:, :-1], tokens[:, 1:, None], axis=-1
    ).squeeze(-1)
    labels = tokens.copy()
    labels[0, ::3] = -100
    counts = np.ones_like(losses, bool)
    counts[0] = labels[0, 1:] != -100
    data = [{"input_ids": row.tolist(), "text": "not read"} for row in tokens]
    data[0]["labels"] = labels[0].tolist()
    data.append({"input_ids": [3]})
    status, found, err = run(
        capsys,
        "score",
        "--model",
        GOLDEN,
        "--data",
        write_rows(tmp_path / "d.jsonl", data),
        "--batch-tokens=17",
    )
    assert status == 0 and found["tokens"] == counts.sum()
    assert found["loss"] == pytest.approx(losses[counts].mean(), abs=1e-5)
    assert found["rows"] == len(data) and "scoring" not in err


@pytest.mark.slow
def test_text_is_tokenized(capsys, folder, tmp_path):
    model = ("score", "--model", folder, "--data")
    text = [{"text": " ".join(f"w{i}" for i in row["input_ids"])} for row in ROWS]
    _, by_text, _ = run(capsys, *model, write_rows(tmp_path / "text.jsonl", text))
    _, by_ids, _ = run(capsys, *model, write_rows(tmp_path / "ids.jsonl", ROWS))
    assert by_text == by_ids and by_ids["tokens"] == 17 + 6


@pytest.mark.slow
def test_adapters_are_scored_merged_and_exported(
    capsys, folder, adapter, rows, tmp_path
):
    path, factors = adapter
    model = ("--model", folder, "--adapter", path)
    _, bare, _ = run(capsys, "score", "--model", folder, "--data", rows)
    _, adapted, _ = run(capsys, "score", *model, "--data", rows)
    assert abs(bare["loss"] - adapted["loss"]) > 0.01

    status, written, _ = run(capsys, "merge", *model, "--out", tmp_path / "merged")
    assert (status, written["format"]) == (0, "merged")
    before, after = map(ql.io.open_safetensors, (folder, tmp_path / "merged"))
    for name in before:
        change = np.asarray(after[name], np.float64) - np.asarray(before[name])
        a, b, scaling = factors.get(name.removesuffix(".weight"), (np.zeros(1),) * 3)
        want = scaling * b.astype(np.float64) @ a if a.ndim > 1 else 0
        np.testing.assert_allclose(
            change, np.broadcast_to(want, change.shape), atol=1e-6
        )
    _, merged, _ = run(capsys, "score", "--model", tmp_path / "merged", "--data", rows)
    assert merged["loss"] == pytest.approx(adapted["loss"], abs=1e-5)

    file = tmp_path / "model.gguf"
    out = ("--format=gguf", "--tokenizer=false", "--out", file)
    assert run(capsys, "export", *model, *out)[1]["format"] == "gguf"
    assert run(capsys, "inspect", file)[1]["about"]["architecture"] == "llama"
    _, halved, _ = run(capsys, "score", "--model", file, "--data", rows)
    assert halved["loss"] == pytest.approx(adapted["loss"], abs=1e-2)
    status, _, err = run(capsys, "export", *model, *out)
    assert status == 1 and "`out` must be new" in err

    # The same adapter in our own format, and back.
    base = abstract_params(config_from_hf(CONFIG))
    names = decoder_names(config_from_hf(CONFIG))
    _, lora, _ = ql.io.load_peft(path, base, names)
    ql.io.save(tmp_path / "adapter.safetensors", lora)
    own = ("--model", folder, "--adapter", tmp_path / "adapter.safetensors")
    assert run(capsys, "score", *own, "--data", rows)[1] == adapted
    out = ("--format", "peft", "--out", tmp_path / "peft")
    assert run(capsys, "export", *own, *out)[0] == 0
    ours, theirs = (
        ql.io.open_safetensors(p / "adapter_model.safetensors")
        for p in (tmp_path / "peft", path)
    )
    assert ours.keys() == theirs.keys()
    for key in theirs:
        np.testing.assert_array_equal(ours[key][...], theirs[key][...])
    kind = lambda p: run(capsys, "inspect", p)[1]
    assert kind(path)["kind"] == kind(tmp_path / "peft")["kind"] == "PEFT adapter"
    assert [leaf["rank"] for leaf in kind(path)["leaves"]] == [4] * 4
    for own_path in (tmp_path, tmp_path / "adapter.safetensors"):
        assert kind(own_path)["kind"] == "qlora_jax tree"


@pytest.mark.slow
def test_quantized_model_is_one_of_bitsandbytes(capsys, folder, rows, tmp_path):
    out = tmp_path / "packed"
    status, written, _ = run(capsys, "quantize", folder, "--out", out, "--fmt", "fp4")
    assert status == 0 and written["bytes"] > 0
    _, found, _ = run(capsys, "inspect", out)
    assert found["kind"] == "bitsandbytes model"
    formats = {leaf["name"]: leaf["format"] for leaf in found["leaves"]}
    assert formats["model.layers.1.mlp.up_proj.weight"] == "fp4 block 64 double"
    assert formats["lm_head.weight"] == "float32"
    _, packed, _ = run(capsys, "score", "--model", out, "--data", rows)
    status, _, err = run(capsys, "quantize", out, "--out", tmp_path / "twice")
    assert status == 1 and "must be in float" in err
    _, written, _ = run(
        capsys,
        *("export", "--model", out, "--format", "bitsandbytes"),
        *("--out", tmp_path / "copy"),
    )
    assert written["format"] == "bitsandbytes"
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "copy" / file).read_bytes()
    config = ql.QLoRAConfig(fmt="fp4", targets=r"layers/.*/kernel")
    decoder, base = load(folder, jnp.float32, config, progress=False)
    again = tmp_path / "again"
    ql.io.save_merged(again, base, {}, decoder_names(decoder), CONFIG)
    _, decoded, _ = run(capsys, "score", "--model", again, "--data", rows)
    assert packed["loss"] == pytest.approx(decoded["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_gguf_file_is_merged_and_packed_as_its_folder_is(capsys, tmp_path):
    folder = save_tiny(tmp_path / "base", rms_norm_eps=2.0**-17)  # GGUF: float32
    stored = ql.io.open_safetensors(folder)
    halved = {name: np.float32(np.float16(stored[name][...])) for name in stored}
    (tmp_path / "base" / "model.safetensors").unlink()
    ql.io.write_safetensors(tmp_path / "base" / "model.safetensors", halved)
    file = tmp_path / "model.gguf"
    run(capsys, "export", "--model", folder, "--format=gguf", "--out", file)
    for source, out in ((folder, "from_folder"), (file, "from_gguf")):
        assert run(capsys, "quantize", source, "--out", tmp_path / out)[0] == 0
    wanted, found = (
        ql.io.open_safetensors(tmp_path / name) for name in ("from_folder", "from_gguf")
    )
    assert {*wanted} == {*found}
    for name in wanted:
        np.testing.assert_array_equal(found[name][...], wanted[name][...], name)
    read = lambda name: ql.io.read_config_json(tmp_path / name)
    assert config_from_hf(read("from_gguf")) == config_from_hf(read("from_folder"))
    out = ("--format=merged", "--out", tmp_path / "merged")
    assert run(capsys, "export", "--model", file, *out)[0] == 0
    merged = ql.io.open_safetensors(tmp_path / "merged")
    for name in halved:
        np.testing.assert_array_equal(merged[name][...], halved[name], name)
    tokenizers_ = [load_tokenizer(p) for p in (folder, tmp_path / "merged")]
    text = "Pay 23 <|im_end|> é\n"
    assert tokenizers_[0].encode(text).ids == tokenizers_[1].encode(text).ids


def test_wrong_data_is_listed_by_line(capsys, folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = ["[1]", "{", '{"input_ids": [1, 96]}', '{"input_ids": []}', '{"text": 3}']
    lines += ['{"input_ids": [1], "labels": [1, 2]}', '{"text": "a", "labels": [1]}']
    data.write_text("\n".join(lines))
    status, _, err = run(capsys, "score", "--model", folder, "--data", data)
    assert status == 1
    for number in range(1, 8):
        assert f"line {number}: " in err
    write_rows(data, [{"input_ids": [4, 4], "labels": [4, -100]}])
    _, _, err = run(capsys, "score", "--model", folder, "--data", data)
    assert "must have a token that counts" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nowhere"], "must be a folder, a .safetensors or a .gguf file"),
        (["score", "--model=nowhere", "--data=x"], "must be a path or a hub id"),
    ],
)
def test_wrong_input_is_an_error_without_a_traceback(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, None)
    assert err.startswith(f"qlora-jax {arguments[0]}: ") and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect"], "must be a whole GGUF file"),
        (["quantize", "--out=new"], "must be a whole GGUF file"),
    ],
)
def test_a_gguf_file_is_checked_before_it_is_read(capsys, tmp_path, arguments, message):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    status, out, err = run(capsys, *arguments, path)
    assert (status, out) == (1, None) and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "qlora-jax: .* but it was not provided"),
        (["score", "--model", "m"], "qlora-jax score: .* required: --data"),
        (["quantize", "--out", "o"], "qlora-jax quantize: .* required: MODEL"),
        (
            ["score", "--model=m", "--data=d", "--batch-tokens=0"],
            "qlora-jax score: `--batch_tokens` must be positive. Got 0",
        ),
        (
            ["score", "--model=m", "--data=d", "--batch-tokens=1.5"],
            "`--batch_tokens` must be a whole number. Got 1.5",
        ),
        (["train", "--lora_alpha=x"], "`--lora_alpha` must be a number. Got x"),
        (
            ["export", "--model=m", "--format=gguff", "--out=o"],
            "`--format` must be one of 'peft', .* Got gguff",
        ),
        (
            ["export", "--model=m", "--format=peft", "--out=o"],
            "`--adapter` or `--run` must",
        ),
        (["export", "--model=m"], "`--out` must be given without `--run`"),
        (
            ["export", "--run=r", "--adapter=a"],
            "`--adapter` or `--run` must be left out",
        ),
        (["export", "--run=r", "--format=gguf"], "`--out` must be given for gguf"),
        (
            ["export", "--run=r", "--format=bitsandbytes"],
            "`--run` must be left out for",
        ),
    ],
)
def test_wrong_command_line_exits_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    first, *rest = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, first)
    assert len(rest) == 1 and re.fullmatch("See qlora-jax .*--help.", rest[0])


@pytest.mark.slow
def test_nobody_reads_on(folder):
    """As behind `| head`: the exit status is that of programs that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qlora_jax.cli.main", "inspect", str(folder)]
    root = pathlib.Path(ql.__file__).parent.parent
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=root)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "flags, resume, packing, remat",
    [
        (["--resume", "--packing", "--remat"], True, True, "true"),
        (["--packing", "--resume=false", "--remat=false"], False, True, "false"),
        (["--resume", "true", "--steps=3", "--packing"], True, True, "true"),
        (["--remat", "offload"], False, False, "offload"),
    ],
)
def test_a_switch_may_stand_alone(capsys, flags, resume, packing, remat):
    with pytest.raises(SystemExit):
        main(["train", "--model=m", "--data=d", "--out=o", *flags, "--print_config"])
    lines = capsys.readouterr().out.splitlines()
    assert f"resume: {str(resume).lower()}" in lines
    assert f"packing: {str(packing).lower()}" in lines
    assert f"remat: {remat}" in lines


@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"examples:\n  qlora-jax {command} " in capsys.readouterr().out


def test_commands_are_python_calls(folder, rows):
    score = cli.score(cli.ScoreConfig(model=str(folder), data=str(rows)))
    assert score.tokens == 23 and str(score).endswith("(23 tokens in 2 rows)")


@pytest.mark.slow
def test_process_with_a_yaml_file(folder, rows, tmp_path, capsys):
    settings = tmp_path / "score.yaml"
    settings.write_text(f"model: {folder}\ndata: nowhere\nbatch_tokens: 32\n")
    given = ["score", "--json", "--config", str(settings)]
    command = [sys.executable, "-m", "qlora_jax.cli.main", *given, "--data", str(rows)]
    root = pathlib.Path(ql.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 23
    assert done.stdout.count("\n") == 1 and "scoring" not in done.stderr
    capsys.readouterr()
    assert main(given) == 1
    failed = capsys.readouterr()
    assert failed.out == "" and "nowhere" in failed.err
    assert "Traceback" not in failed.err
