"""The study of fine-tuning quality, benchmarks/quality.py."""

import json

import numpy as np
import pytest
import quality
from small_models import Task

from qlora_jax.llm.models.tiny import save_tiny

NF4 = quality.Arm("nf4", "nf4", False, rank=4, seeds=2)


def row(rate, valid, seed=0):
    return {"rate": rate, "seed": seed, "valid": valid}


@pytest.mark.parametrize(
    ("rows", "expected_plan"),
    [
        ([], (0, [1, 2, 4])),
        ([row(1, 0.1), row(2, 0.2), row(4, None)], (0, [0.5])),
        ([row(1, 0.3), row(2, 0.2), row(4, 0.1)], (0, [8])),
        ([row(1, 0.3), row(2, 0.1), row(4, 0.2)], (1, [2])),
        ([row(1, 0.3), row(2, 0.1), row(4, 0.2), row(2, 0.5, seed=1)], None),
    ],
)
def test_rates_are_searched_until_the_best_is_between_others(rows, expected_plan):
    assert quality.plan(rows, 2, seeds=2) == expected_plan


def test_intervals_are_by_students_t():
    # 4.303 = t(0.975) of two degrees of freedom; the standard error is 1 / sqrt(3).
    interval = quality.interval(np.array([1.0, 2.0, 3.0]))
    assert interval == pytest.approx((2.0, 2.484), abs=1e-3)


def make_task(folder):
    """Writes a model and the data of a task."""
    save_tiny(folder / "model")
    (folder / "task").mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"prompt": f"{i} and", "completion": f"{i + 1}"} for i in range(8)]
        text = "".join(json.dumps(x) + "\n" for x in rows)
        (folder / "task" / f"{split}.jsonl").write_text(text)
    return Task("task", "model", 8e-2, 2e-2, steps=2, max_length=32, batch_size=4)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path):
    task = make_task(tmp_path)
    results = tmp_path / "quality.jsonl"
    quality.study(tmp_path, task, NF4, results, end=0)  # no time
    assert not results.exists()
    for arm in (NF4, quality.Arm("full", rank=None, seeds=1)):
        quality.study(tmp_path, task, arm, results, end=float("inf"))
    records = quality.read_records(results)
    quality.study(tmp_path, task, NF4, results, end=float("inf"))
    assert quality.read_records(results) == records
    results_of_arm = quality.by_arm(records, "task")
    assert (
        len(results_of_arm["nf4"].best) == 2 and len(results_of_arm["full"].best) == 1
    )
    assert results_of_arm["nf4"].values("merged") == pytest.approx(
        results_of_arm["nf4"].values("test"), rel=1e-2
    )
    for arm in results_of_arm.values():
        assert min(arm.values("test")) < arm.before["test"]
    assert len(quality.table(results_of_arm, is_text=False)) == 2
