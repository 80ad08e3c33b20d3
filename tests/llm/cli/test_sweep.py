"""`qlora-jax train` with several learning rates and seeds."""

import json
import re
import shutil

import commands
import pytest
import yaml
from commands import ADAPTER, losses, rows_of, settings
from stored import tensors_of
from tolerances import assert_close

from qlora_jax.llm import app
from qlora_jax.llm.app.base_model import BaseModel
from qlora_jax.llm.models.tiny import save_tiny

OPTIONS = dict(steps=6, save_every=2, eval_every=3, eval_examples=2, lora_dropout=0.1)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The settings of a sweep, its result, and its folder."""
    work = tmp_path_factory.mktemp("sweep")
    (work / "data").mkdir()
    folder, data = save_tiny(work / "base"), commands.write_letters(work / "data")
    rates = dict(learning_rate="1e-3,0.02", seed=[0, 3], data_seed=1)
    config = settings(folder, data, work / "out", **OPTIONS, **rates)
    return config, app.train(config), work


@pytest.mark.slow
def test_each_run_equals_a_run_alone(sweep):
    config, result, work = sweep
    names = [f"learning_rate={x}_seed={s}" for x in (0.001, 0.02) for s in (0, 3)]
    assert [*result.runs] == names
    for name in names[1:3]:
        rate, seed = re.findall(r"=([^_]*)", name)
        overrides = dict(learning_rate=float(rate), seed=int(seed), data_seed=1)
        paths = config.model, config.data, work / name
        alone = settings(*paths, **OPTIONS, **overrides)
        expected = app.train(alone)
        row_pairs = zip(rows_of(work / "out" / name), rows_of(work / name), strict=True)
        for row, expected_row in row_pairs:
            for key in {*expected_row} - {"seconds", "tokens_per_s"}:
                assert_close(row[key], expected_row[key])
        assert_close(result.runs[name].valid_loss, expected.valid_loss)
        a, b = (tensors_of(x / name / "adapter") for x in (work / "out", work))
        assert_close(a, b)


@pytest.mark.slow
def test_the_best_is_kept_and_all_are_exported(sweep):
    config, result, work = sweep
    out, runs = work / "out", result.runs
    best = min(runs, key=lambda name: runs[name].valid_loss)
    files = [(out / x / ADAPTER).read_bytes() for x in (best, ".")]
    assert (result.best, result.adapter) == (best, str(out / "adapter"))
    assert files[0] == files[1]
    names = ["adapter", "config.yaml", *sorted(runs), "loss.png", "result.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "result.json").read_text())["best"] == best
    assert f"the adapter of {best}, of the lowest validation loss" in str(result)
    exported = work / "exported"
    app.export(app.ExportConfig(run=str(out / best), out=str(exported)))
    assert (exported / "adapter_model.safetensors").read_bytes() == files[0]


@pytest.mark.slow
def test_a_sweep_resumes_and_goes_on_without_a_failed_run(sweep, capfd):
    config, _, work = sweep
    rates = dict(learning_rate=[0.02, 1e38], seed=3, data_seed=1)
    options = dict(OPTIONS, eval_examples=0, **rates)
    paths = config.model, config.data, work / "again"
    first = app.train(settings(*paths, **options | dict(steps=3)))
    good, bad = "learning_rate=0.02", "learning_rate=1e+38"
    assert first.runs[bad] is None and first.best == good
    assert f"{bad} failed: step 3 has loss" in capfd.readouterr().err
    last = app.train(settings(*paths, **options, resume=True))
    assert "Resuming after step 3 of 6" in capfd.readouterr().err
    assert last.runs[bad] is None and "1e+38  failed" in str(last)
    expected_losses = losses(work / "out" / f"{good}_seed=3")
    assert_close(losses(work / "again" / good), expected_losses)


@pytest.fixture(scope="module")
def short_sweep(tmp_path_factory):
    """The settings of a sweep with seeds 0 and 1, after two steps, and its folder."""
    work = tmp_path_factory.mktemp("short")
    folder, data = save_tiny(work / "base"), commands.write_letters(work)
    options = dict(eval_examples=0, seed=[0, 1], data_seed=0, steps=2, warmup=0)
    config = settings(folder, data, work / "out", **options)
    app.train(config)
    return config, work / "out"


@pytest.mark.parametrize("seed", [[0, 5], [5, 0], 0])
def test_a_sweep_does_not_resume_with_other_values(short_sweep, seed):
    config, out = short_sweep
    before = {x: x.read_bytes() for x in out.rglob("*") if x.is_file()}
    message = re.escape(f"'seed': {seed}}} instead of {{'learning_rate': 0.02, 'seed'")
    with pytest.raises(ValueError, match=message):
        app.train(config.replace(seed=seed, steps=3, resume=True))
    assert {x: x.read_bytes() for x in out.rglob("*") if x.is_file()} == before


def test_a_sweep_names_the_folders_of_its_runs(short_sweep):
    _, out = short_sweep
    with pytest.raises(ValueError, match="runs are in its folders seed=0, seed=1"):
        app.inspect(app.InspectConfig(str(out)))
    with pytest.raises(ValueError, match="runs are in its folders seed=0, seed=1"):
        app.score(app.ScoreConfig(run=str(out), data="rows.jsonl"))


def test_a_run_does_not_resume_with_fewer_steps_than_it_has_done(short_sweep):
    config, _ = short_sweep
    message = "`steps` must be at least 2, the step from which the run resumes. Got 1"
    with pytest.raises(ValueError, match=message):
        app.train(config.replace(steps=1, resume=True))


def test_a_run_does_not_resume_as_a_sweep(short_sweep, tmp_path):
    config, out = short_sweep
    shutil.copytree(out / "seed=0", tmp_path / "run")
    with pytest.raises(ValueError, match="`resume` must be used with the learning rat"):
        app.train(config.replace(out=str(tmp_path / "run"), resume=True))


def test_a_sweep_that_was_killed_between_its_first_states_starts_again(
    short_sweep, tmp_path, capfd
):
    config, out = short_sweep
    again = tmp_path / "out"
    shutil.copytree(out, again)
    shutil.rmtree(again / "seed=1" / "state")
    app.train(config.replace(out=str(again), resume=True))
    assert "No step has a saved state of every run in" in capfd.readouterr().err
    for name in ("seed=0", "seed=1"):
        assert losses(again / name) == losses(out / name)
        assert (again / name / ADAPTER).read_bytes() == (
            out / name / ADAPTER
        ).read_bytes()


def test_a_sweep_that_failed_as_a_whole_does_not_resume(tmp_path):
    config = settings("model", "data", tmp_path, seed=[0, 1], resume=True)
    for seed in (0, 1):
        (tmp_path / f"seed={seed}").mkdir()
        (tmp_path / f"seed={seed}" / "failed.txt").write_text("step 1 has loss nan")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_settings()))
    with pytest.raises(ValueError, match="a sweep whose runs have all failed; see fai"):
        app.train(config)


def test_the_best_adapter_is_only_pushed_with_validation_rows(tmp_path, monkeypatch):
    folder, data = save_tiny(tmp_path / "base"), commands.write_letters(tmp_path)
    for name in ("check_base", "push"):
        monkeypatch.setattr(f"qlora_jax.llm.app.run.{name}", lambda *unused: None)
    monkeypatch.setattr(BaseModel, "read", None)
    options = dict(seed=[0, 1], push_to_hub="some/new")
    config = settings(folder, data / "train.jsonl", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="`push_to_hub` needs validation rows if sev"):
        app.train(config)
    assert not (tmp_path / "out").exists()
