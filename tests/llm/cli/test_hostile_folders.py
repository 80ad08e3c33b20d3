"""Commands on folders of hostile files."""

import ast
import json
import pathlib
import shutil

import pytest
from commands import run
from hostile_files import (
    change_settings,
    commands_on,
    link_outside,
    list_files,
    make_adapter,
    make_model,
)

import qlora_jax as ql
from qlora_jax.llm.cli.main import main

PACKAGE = pathlib.Path(ql.__file__).parent


# Files of models, among them those that only transformers, or an export, reads.
MODEL_FILES = ["added_tokens.json", "additional_chat_templates"]
MODEL_FILES += ["additional_chat_templates/tool_use.jinja", "chat_template.jinja"]
MODEL_FILES += ["config.json", "generation_config.json", "merges.txt", "spiece.model"]
MODEL_FILES += ["model.safetensors", "preprocessor_config.json", "tokenizer.json"]
MODEL_FILES += ["special_tokens_map.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a harmless model, an adapter, and a run with two states."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "model")
    make_adapter(folder / "adapter")
    arguments = commands_on(folder / "model", folder)["train"]
    assert main([*map(str, arguments), "--steps=2", "--save-every=1"]) == 0
    return folder


@pytest.fixture
def folder(models, tmp_path):
    """A copy of `models`."""
    return shutil.copytree(models, tmp_path / "copy")


@pytest.mark.slow
def test_harmless_files_are_read(models, tmp_path, capsys):
    # Otherwise, the other tests would pass for any reason.
    commands = commands_on(models / "model", tmp_path)
    for arguments in commands.values():
        assert run(capsys, *arguments)[0] == 0
    adapter = ["--adapter", models / "adapter"]
    assert run(capsys, *commands["generate"], *adapter)[0] == 0


def test_transformers_never_runs_code_of_a_folder():
    # `None`, the default, asks on standard input.
    unsafe = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            values = [
                ast.unparse(keyword.value)
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code"
            ]
            if name in ("from_pretrained", "from_config") and values != ["False"]:
                unsafe.append(f"{file.relative_to(PACKAGE)}:{node.lineno}")
    assert not unsafe


@pytest.mark.parametrize("name", MODEL_FILES)
def test_links_out_of_a_models_folder_are_refused(name, folder, tmp_path, capsys):
    model = link_outside(folder / "model", name, tmp_path / "outside")
    (tmp_path / "work").mkdir()
    for arguments in commands_on(model, tmp_path / "work").values():
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (
            1,
            "",
        ) and f"{model / name} must be in its folder" in err
    assert [*(tmp_path / "work").iterdir()] == [tmp_path / "work" / "rows.jsonl"]


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter.safetensors"]
)
def test_links_out_of_an_adapters_folder_are_refused(name, folder, tmp_path, capsys):
    adapter = link_outside(folder / "adapter", name, tmp_path / "outside")
    model = folder / "model"
    commands = [
        [*commands_on(model, folder)["generate"], "--adapter", adapter],
        [*commands_on(model, folder)["score"], "--adapter", adapter],
        [*commands_on(model, folder)["merged"], "--adapter", adapter],
        [*commands_on(model, folder)["train"], "--adapter", adapter, "--out", "new"],
    ]
    for arguments in commands:
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert f"{adapter / name} must be in its folder" in err


@pytest.mark.slow
def test_links_in_the_cache_of_the_hub_lead_to_its_blobs(folder, tmp_path, capsys):
    cache = tmp_path / "models--org--model"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = shutil.move(folder / "model", cache / "snapshots" / "0123abc")
    for index, file in enumerate([*snapshot.iterdir()]):
        file.rename(cache / "blobs" / str(index))
        file.symlink_to(f"../../blobs/{index}")
    for arguments in commands_on(snapshot, tmp_path).values():
        assert run(capsys, *arguments)[0] == 0


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "metrics.jsonl", "result.json", "adapter", "state"]
    + ["state/2", "state/2/state", "adapter/adapter_model.safetensors"],
)
def test_links_out_of_a_runs_folder_are_refused(name, folder, tmp_path, capsys):
    outside, data = tmp_path / "outside", folder / "rows.jsonl"
    path = link_outside(folder / "run", name, outside)
    before = list_files(outside)
    train = commands_on(folder / "model", folder)["train"]
    commands = [
        [*train, "--steps=2", "--save-every=1", "--resume"],
        ["generate", "--run", path, "--prompt", "in", "--max-new-tokens=1"],
        ["score", "--run", path, "--data", data],
        ["export", "--run", path],
        ["export", "--run", path, "--format=merged", "--out", folder / "merged"],
    ]
    for arguments in commands:
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, ""), arguments
        assert f"{path / name} must be in its folder" in err
    assert list_files(outside) == before


@pytest.mark.slow
def test_paths_in_the_file_of_a_run_are_not_used(folder, tmp_path, capsys):
    path, secret = folder / "run", tmp_path / "secret"
    secret.write_text("do not tell")
    paths = dict.fromkeys(["data", "out", "adapter", "template"], str(secret))
    change_settings(path / "config.yaml", **paths)
    options = ["--run", path, "--prompt", "in", "--max-new-tokens=1"]
    data = ["--data", folder / "rows.jsonl"]
    for arguments in (
        ["generate", *options],
        ["score", "--run", path, *data],
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (1, "")
        assert f"`template` must be a file. Got '{path}/template.jinja'" in err
        assert "secret" not in err and "do not tell" not in err
    # A path on the command line is used.
    template = tmp_path / "short.jinja"
    template.write_text("{{ messages[0].content }}")
    status, out, err = run(
        capsys, "generate", *options, "--template", template, "--json"
    )
    assert status == 0 and json.loads(out)["answers"][0]["prompt_tokens"] == 1
    # Exports read no rows, and are written into the folder of the run.
    status, out, err = run(capsys, "export", "--run", path)
    assert status == 0 and (path / "adapter-2").is_dir() and "secret" not in out + err


def test_a_resumed_run_in_another_folder_is_named(folder, tmp_path, capsys):
    run_folder = folder / "run"
    arguments = ["train", "--config", run_folder / "config.yaml", "--resume"]
    arguments += ["--steps", 1]  # refused, because the run has taken two
    other = shutil.copytree(run_folder, tmp_path / "other")
    for out, is_named in ((run_folder, False), (other, True)):
        change_settings(run_folder / "config.yaml", out=str(out))
        status, _, err = run(capsys, *arguments)
        assert status == 1 and (f"The run in '{out}' is resumed" in err) == is_named
        assert "is resumed" not in run(capsys, *arguments, "--out", out)[2]
