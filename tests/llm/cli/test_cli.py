"""The command line: its results, its exit status, its stdout and stderr."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import PROGRAM, ROOT, run_python
from commands import run as run_command
from helpers import (
    TABLES,
    assert_same_bits,
    fast_and_slow,
    quantize,
    relative_error,
    rounding,
)
from stored import draw_peft, tensors_of
from tokenizer_helpers import write_rows
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.exporting.repacking import repack
from qlora_jax.llm.app.open_model import OpenModel
from qlora_jax.llm.app.training.run import make_run
from qlora_jax.llm.cli.main import main
from qlora_jax.llm.cli.parser import COMMANDS
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.models.checkpoint import (
    abstract_params,
    load,
    read_config,
)
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.jax_engine import JaxEngine
from qlora_jax.llm.models.tiny import save_tiny

GOLDEN = ROOT / "tests" / "data" / "models" / "llama_tied"
TEXTS = ["five and nine", "two"]
DOWN = "model.layers.1.mlp.down_proj"
Q4_0 = gguf.GGMLQuantizationType.Q4_0
MODULES = ("self_attn.q_proj", "mlp.down_proj")
TENSORS = "compressed-tensors"
GENERATE = ["generate", "--model=m", "--prompt=p"]
SCORE, RUN = ["score", "--model=m", "--data=d"], ["--run=r", "--out=o"]


def run(capsys, *arguments):
    """Runs a command with `--json`; returns its status, its JSON and its stderr."""
    status, out, err = run_command(capsys, *arguments, "--json")
    return status, json.loads(out) if out else None, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "base"
    return pathlib.Path(save_tiny(folder, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def rows(folder):
    tokenizer = open_tokenizer(folder).inner
    ids = [{"input_ids": tokenizer.encode(text).ids} for text in TEXTS]
    return write_rows(folder.parent / "rows.jsonl", ids)


@pytest.fixture(scope="module")
def adapter(folder):
    """The folder of a PEFT adapter, and (A, B, scaling) of each of its modules."""
    path, tensors = folder.parent / "adapter", tensors_of(folder)
    shapes = {name.removesuffix(".weight"): x.shape for name, x in tensors.items()}
    shapes = {name: shape for name, shape in shapes.items() if name.endswith(MODULES)}
    settings = dict(alpha_pattern={"layers.0.self_attn.q_proj": 3})
    settings |= dict(target_modules=["q_proj", "down_proj"])
    factors = draw_peft(path, shapes, **settings)

    def scaling(module):
        return 0.75 if "0.self_attn.q_proj" in module else 2

    return path, {module: (*x, scaling(module)) for module, x in factors.items()}


def merged_by_hand(folder, factors):
    tensors = tensors_of(folder)
    for module, (a, b, scaling) in factors.items():
        tensors[f"{module}.weight"] += scaling * b @ a
    return tensors


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
    # Two short rows and one without target tokens share a batch.
    data += [{"input_ids": tokens[0, :9].tolist()}, {"input_ids": [3]}]
    data += [{"input_ids": tokens[1, :7].tolist()}]
    target_losses = np.concatenate([losses[counts], losses[0, :8], losses[1, :6]])
    rows = write_rows(tmp_path / "d.jsonl", data)
    options = ("--model", GOLDEN, "--data", rows, "--batch-tokens=17")
    status, score, err = run(capsys, "score", *options)
    assert status == 0 and score["tokens"] == len(target_losses)
    assert_close(score["loss"], target_losses.mean())
    assert score["rows"] == len(data) and "scoring" not in err


@pytest.mark.slow
def test_text_is_tokenized(capsys, folder, rows, tmp_path):
    model = ("score", "--model", folder, "--data")
    text = write_rows(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])
    _, by_text, _ = run(capsys, *model, text)
    _, by_ids, _ = run(capsys, *model, rows)
    assert by_text == by_ids and by_ids["tokens"] == tokens_of(rows)


def test_an_adapter_of_the_head_is_scored(capsys, folder, rows, tmp_path):
    """The reference model has B A added to its head by NumPy."""
    head = tensors_of(folder)["lm_head.weight"]
    factors = draw_peft(
        tmp_path / "adapter", {"lm_head": head.shape}, target_modules=["lm_head"]
    )
    a, b = factors["lm_head"]
    merged = shutil.copytree(folder, tmp_path / "merged")
    tensors = tensors_of(folder) | {"lm_head.weight": head + 2 * b @ a}
    ql.io.write_safetensors(merged / "model.safetensors", tensors)
    score = ("score", "--data", rows, "--model")
    status, adapted_score, _ = run(
        capsys, *score, folder, "--adapter", tmp_path / "adapter"
    )
    merged_score = run(capsys, *score, merged)[1]
    assert status == 0 and adapted_score["tokens"] == merged_score["tokens"]
    assert relative_error(adapted_score["loss"], merged_score["loss"]) < rounding(
        head.shape[1]
    )
    assert (
        relative_error(adapted_score["loss"], run(capsys, *score, folder)[1]["loss"])
        > 1e-2
    )


def tokens_of(rows):
    """Counts the target tokens: all but the first of each row."""
    lines = rows.read_text().splitlines()
    return sum(len(json.loads(line)["input_ids"]) - 1 for line in lines)


@pytest.mark.slow
def test_adapters_are_scored_merged_and_exported(
    capsys, folder, adapter, rows, tmp_path, monkeypatch
):
    path, factors = adapter
    model = ("--model", folder, "--adapter", path)
    _, bare, _ = run(capsys, "score", "--model", folder, "--data", rows)
    _, adapted, _ = run(capsys, "score", *model, "--data", rows)
    assert abs(bare["loss"] - adapted["loss"]) > 0.01
    pushes, out = [], ("--format=merged", "--out", tmp_path / "merged")

    def record_push(*arguments):
        return pushes.append((*arguments, (tmp_path / "merged").exists()))

    monkeypatch.setattr("qlora_jax.llm.app.commands.export.push", record_push)
    status, written, _ = run(capsys, "export", *model, *out, "--push-to-hub=a/b")
    assert (status, written["format"]) == (0, "merged")
    assert pushes == [("a/b", False), ("a/b", tmp_path / "merged", True)]
    merged = tensors_of(tmp_path / "merged")
    expected = merged_by_hand(folder, factors)
    assert_close(merged, expected, terms=64)
    _, merged, _ = run(capsys, "score", "--model", tmp_path / "merged", "--data", rows)
    assert_close(merged["loss"], adapted["loss"])

    file = tmp_path / "model.gguf"
    out = ("--format=gguf", "--tokenizer=false", "--out", file)
    assert run(capsys, "export", *model, *out)[1]["format"] == "gguf"
    stored = {x.name: x.data for x in gguf.GGUFReader(str(file)).tensors}
    down = np.float32(stored["blk.1.ffn_down.weight"])
    assert_close(down, expected[f"{DOWN}.weight"], terms=64, dtype="float16")
    status, _, err = run(capsys, "export", *model, *out)
    assert status == 1 and "`out` must be new" in err

    # The same adapter in the format of qlora_jax, and back.
    config = read_config(folder)
    shapes, names = abstract_params(config), decoder_names(config)
    _, lora, _ = ql.io.load_peft(path, shapes, names)
    ql.io.save(tmp_path / "adapter.safetensors", lora)
    tree_model = ("--model", folder, "--adapter", tmp_path / "adapter.safetensors")
    assert run(capsys, "score", *tree_model, "--data", rows)[1] == adapted
    out = ("--format", "peft", "--out", tmp_path / "peft")
    assert run(capsys, "export", *tree_model, *out)[0] == 0
    # The file has one scaling, so that B of the module with another one is multiplied.
    expected, [module] = tensors_of(path), [x for x in factors if factors[x][2] == 0.75]
    expected[f"base_model.model.{module}.lora_B.weight"] *= np.float32(0.75 / 2)
    assert_same_bits(tensors_of(tmp_path / "peft"), expected)


@pytest.mark.slow
def test_a_packed_model_is_scored_as_its_decoded_weights(
    capsys, folder, rows, tmp_path
):
    out, again = tmp_path / "packed", tmp_path / "again"
    pack = ("export", "--format=bitsandbytes", "--model", folder, "--fmt=fp4")
    assert run(capsys, *pack, "--out", out)[1]["bytes"] > 0
    config = ql.QLoRAConfig(fmt="fp4", targets=r"layers/.*/kernel")
    decoder, base = load(folder, jnp.float32, config, progress=False)
    ql.io.save_merged(again, base, {}, decoder_names(decoder), folder)
    score = ("score", "--data", rows, "--model")
    packed, decoded = (run(capsys, *score, x)[1]["loss"] for x in (out, again))
    assert_close(packed, decoded)


@pytest.mark.parametrize(
    "flags, kind, stored",
    fast_and_slow(
        [(["awq", "--block-size=32"], "awq", ("int4_f16", 32, False))],
        [
            (["bitsandbytes", "--fmt=fp4"], "bitsandbytes", ("fp4", 64, True)),
            (["compressed-tensors", "--fmt=q4_0"], TENSORS, ("int4_f16", 32, False)),
            (["nvfp4"], TENSORS, ("nvfp4", 16, False)),
        ],
    ),
)
def test_packed_folders_of_servers(capsys, folder, rows, tmp_path, flags, kind, stored):
    out, copy = tmp_path / "packed", tmp_path / "copy"
    pack = ("export", "--format", *flags, "--model", folder, "--out", out)
    assert run(capsys, *pack)[0] == 0
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == kind
    assert (out / "tokenizer.json").is_file()
    tensors = ql.io.packed_tensors(ql.io.open_safetensors(out))
    packing = tensors["model.layers.1.mlp.up_proj.weight"].packing
    assert (packing.fmt, packing.block_size, packing.double_quant) == stored
    assert tensors["lm_head.weight"].dtype == np.float32
    # By default, `train` keeps the packing of the model.
    train = dict(model=str(out), data=str(rows), out=str(copy), steps=1)
    trained = make_run(app.TrainConfig.from_settings(train), "2026-11-28")
    fmt, size, _ = stored
    settings = (
        trained.config.fmt,
        trained.config.block_size,
        trained.packing_config,
    )
    assert settings == (fmt, size, None)
    again = ("export", "--format", flags[0], "--model", out, "--out", copy)
    status, _, err = run(capsys, *again, "--block-size=128")
    assert status == 1 and f"`block_size` must be {size}, as in the model" in err
    assert run(capsys, *again)[0] == 0
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (copy / file).read_bytes()


@pytest.mark.slow
def test_a_merge_into_4_bits_reports_its_cost(capsys, folder, adapter, rows, tmp_path):
    path, factors = adapter
    base, merged = tensors_of(folder), merged_by_hand(folder, factors)
    packed = {}
    for name in [name for name in base if name.endswith("_proj.weight")]:
        codes, scales = quantize(np.float32(merged[name].T), "nf4", 64)
        packed[name] = (TABLES["nf4"][codes] * np.repeat(scales, 64, axis=0)).T

    def concat_kernels(tensors, names=packed):
        return np.concatenate([tensors[name].ravel() for name in names])

    def rounding_error(names):
        return relative_error(
            concat_kernels(packed, names), concat_kernels(merged, names)
        )

    change = concat_kernels(merged) - concat_kernels(base)

    pack = ("export", "--format=bitsandbytes", "--double-quant=false", "--model")
    out, alone, onto = tmp_path / "packed", tmp_path / "alone", ("--adapter", path)
    merge_options = (*onto, "--out", out)
    status, written, _ = run(capsys, *pack, folder, *merge_options)
    cost = written["cost"]
    assert status == 0
    run(capsys, *pack, folder, "--out", alone)
    expected_cost = {
        "error": rounding_error(packed),
        "change": relative_error(concat_kernels(base), concat_kernels(merged)),
        "kept": (concat_kernels(packed) - concat_kernels(base))
        @ change
        / (change @ change),
    }
    assert_close(
        {k: cost[k] for k in expected_cost},
        {k: float(x) for k, x in expected_cost.items()},
    )
    file = tmp_path / "model.gguf"
    q4_0 = ("--format=gguf", "--gguf-type=Q4_0", "--tokenizer=false", "--out", file)
    status, written, _ = run(capsys, "export", "--model", folder, *onto, *q4_0)
    assert status == 0
    stored = {x.name: x.data for x in gguf.GGUFReader(str(file)).tensors}
    expected_data = gguf.quantize(np.float32(merged[f"{DOWN}.weight"]), Q4_0)
    decoded = (
        gguf.dequantize(x, Q4_0)
        for x in (stored["blk.1.ffn_down.weight"], expected_data)
    )
    assert_close(*decoded)

    # The base is in this format already, so that a small change is rounded away.
    config, params = load(alone, progress=False)
    targets = {"fmt": None, "targets": ".*_proj/kernel"}
    _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=2, **targets))
    lora = jax.tree.map(lambda x: x + 1e-3, lora)
    ql.io.save(tmp_path / "small.safetensors", lora)
    small = ("--adapter", tmp_path / "small.safetensors", "--out", tmp_path / "lost")
    with pytest.warns(UserWarning, match=r"keeps (none|\d+%) of what the adapter"):
        assert run(capsys, *pack, alone, *small)[0] == 0


def test_a_negative_share_of_a_change_is_none():
    """The change is much smaller than the error of packing, and points against it."""
    base = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    packing = ql.QLoRAConfig(fmt="nf4", targets="kernel")
    packed = ql.quantize(base, packing)["kernel"]
    u, s, v = np.linalg.svd(ql.dequantize(packed) - base["kernel"])
    settings = {"fmt": None, "targets": "kernel", "rank": 1, "alpha": 1}
    _, lora = ql.init(jax.random.key(0), base, ql.QLoRAConfig(**settings))
    small = dataclasses.replace(lora["kernel"], a=u[:, :1], b=-0.01 * s[0] * v[:1])
    engine = JaxEngine(GOLDEN, read_config(GOLDEN))
    model = OpenModel(engine, base, {"kernel": small})
    with pytest.warns(UserWarning, match="keeps none of what the adapter changed"):
        _, cost = repack(model, packing)
    assert cost.kept < -1 and str(cost).endswith("%, of which none is left")


def test_wrong_data_is_listed_by_line(capsys, folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    lines = ["[1]", "{", '{"input_ids": [1, 999]}', '{"input_ids": []}', '{"text": 3}']
    lines += ['{"input_ids": [1], "labels": [1, 2]}', '{"text": "a", "labels": [1]}']
    data.write_text("\n".join(lines))
    status, _, err = run(capsys, "score", "--model", folder, "--data", data)
    assert status == 1
    for number in range(1, 8):
        assert f"line {number}: " in err
    write_rows(data, [{"input_ids": [4, 4], "labels": [4, -100]}])
    _, _, err = run(capsys, "score", "--model", folder, "--data", data)
    assert "must have at least one target token" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score", "--model=nowhere", "--data=x"], "must be a path or a hub id"),
        (["score", "--data=x", "--model", "FILE"], "must be a folder with config.json"),
    ],
)
def test_wrong_input_is_an_error_without_a_traceback(
    capsys, tmp_path, arguments, message
):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + b"\xff" * 60)
    arguments = [file if x == "FILE" else x for x in arguments]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, None)
    assert err.startswith(f"qlora-jax {arguments[0]}: ") and message in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "qlora-jax: the command must be .*, check. Got none"),
        (["score", "--model", "m"], "score: `data` must be given"),
        (
            [*SCORE, "--batch-tokens=0"],
            "score: `batch_tokens` must be at least 2. Got 0",
        ),
        ([*SCORE, "--batch-tokens=1.5"], "`batch_tokens` must be an integer. Got 1.5"),
        (["train", "--lora_alpha=x"], "`lora_alpha` must be a number. Got x"),
        (
            ["export", "--model=m", "--format=gguff"],
            "`format` must be peft, .* Got gguff",
        ),
        (["export", "--for=vllm", "--format=peft"], "`format` or `for` must be left"),
        (["export", "--for=vllm", "--model=m", "--out=o"], "must be given for vllm"),
        (
            ["export", *RUN, "--for=mlx", "--gguf-type=Q8_0"],
            "`gguf_type` must be left out",
        ),
        (
            ["export", *RUN, "--format=merged", "--tokenizer=false"],
            "`tokenizer` must be left out unless the format is one of gguf",
        ),
        (["export", *RUN, "--for=mlx", "--tokenizer=false"], "Got False for mlx"),
        (["export", "--for", "x"], "`for` must be vllm, .* Got x"),
        (["score", "--adapter=a"], "`model` must be given if `run` is not"),
        (["export", "--model=m", "--out=o"], "`adapter` or `run` must be given"),
        (["export", "--model=m"], "`out` must be given if `run` is not"),
        (["export", "--step=1"], "`model` and `out` must be given if `run` is not"),
        (["export", "--run=r", "--adapter=a"], "`adapter` or `run` must be left out"),
        (["score", "--run=r", "--adapter=a"], "`adapter` or `run` must be left out"),
        (["export", "--run=r", "--format=gguf"], "`out` must be given for gguf"),
        (["export", "--run=r", "--fmt=nf4"], "`fmt` must be left out unless"),
        # MLX is a format and a server: only the server has a base.
        (
            ["export", "--run=r", "--out=o", "--format=mlx", "--fmt=nf4"],
            "`fmt` must be left out unless",
        ),
        (
            ["export", "--run=r", "--block-size=64"],
            "one of .* nvfp4, merged, gguf. Got 64 for peft",
        ),
        ([*GENERATE, "--temperature=-1"], "`temperature` must be at least 0"),
        ([*GENERATE, "--top-k=3"], "`temperature` must be positive with `top_k` or"),
        ([*GENERATE, "--max-new-tokens=0"], "`max_new_tokens` must be positive"),
        ([*GENERATE, "--seed=-1"], "`seed` must be from 0"),
        ([*GENERATE, "--system=s", "--chat=false"], "`system` must be left out with"),
        ([*GENERATE, "--prompt= "], "`prompt` must have text"),
    ],
)
def test_wrong_command_line_exits_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    *message_lines, last_line = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message, " ".join(message_lines))
    assert message_lines[0].startswith("qlora-jax") and re.fullmatch(
        "See .*--help.", last_line
    )


@pytest.mark.slow
def test_nobody_reads_on(folder):
    """As with `| head`: the exit status is 128 + SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run_python(*PROGRAM, *SCORE, "--print-config", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_warning_is_one_line(folder, rows, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"not_a_key": 1}
    (model / "config.json").write_text(json.dumps(config))
    done = run_python(
        *PROGRAM,
        "train",
        "--preview=1",
        f"--model={model}",
        f"--data={rows}",
        "--out=o",
    )
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if "not_a_key" in line]
    assert line.startswith("warning: These keys of config.json are unknown")
    assert "warn(" not in done.stderr and ".py:" not in done.stderr


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


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_examples_and_says_where_programs_are(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert not command or f"examples:\n  qlora-jax {command}" in out
    if command in (None, "generate"):
        assert "qlora_jax" in out and "JAX_ENABLE_COMPILATION_CACHE=false" in out
