"""`qlora-jax check`."""

import contextlib
import json
import runpy

import commands
import jax
import numpy as np
import pytest
from commands import ROOT

import qlora_jax as ql
from qlora_jax.llm.app.commands import check as checking
from qlora_jax.llm.app.commands.check import Checked


@pytest.fixture
def small(monkeypatch):
    """Checks only two formats, and replaces the training step by a fixed result."""
    monkeypatch.setattr(checking, "FORMATS", ["nf4", "mxfp4"])
    step = {"loss": 5.0, "cpu": None, "is_right": True}
    monkeypatch.setattr(checking, "check_step", lambda: step)


def test_a_right_device_passes(small, capsys):
    status, out, _ = commands.run(capsys, "check", "--json")
    report = json.loads(out)
    names = {x["format"] for x in report["products"]}
    assert (status, names) == (0, {"nf4", "nf4 double", "mxfp4"})
    assert report["versions"]["jax"] == jax.__version__
    checked = Checked(**report)
    assert "products: 24 of 24 are right, with at most 0." in str(checked)
    row = runpy.run_path(str(ROOT / "docs" / "ran_on.py"))["row"](report)
    assert row[2] == "24 of 24"


@pytest.mark.slow
def test_a_step_is_compared_with_the_cpu(monkeypatch):
    """The test device is a CPU itself, and is treated as if it were another device."""
    null_context = contextlib.nullcontext(True)
    monkeypatch.setattr(checking, "on_cpu", lambda: null_context)
    step = checking.check_step()
    assert step["is_right"] and step["cpu"] == step["loss"]
    assert step["loss"] == pytest.approx(np.log(512), rel=0.1)  # random weights
    losses = iter([5.0, 5.1])
    monkeypatch.setattr(checking, "_train", lambda: next(losses))
    assert not checking.check_step()["is_right"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["scaled", "rounded", "not finite"])
def test_a_wrong_product_is_found(small, fault, monkeypatch, capsys):
    faults = {
        "scaled": lambda y: y * 1.01,
        "rounded": lambda y: y.astype("bfloat16").astype(y.dtype),
        "not finite": lambda y: y * np.inf,
    }
    exact_matmul = ql.matmul

    def faulty_matmul(*args, **settings):
        return faults[fault](exact_matmul(*args, **settings))

    monkeypatch.setattr(ql, "matmul", faulty_matmul)
    checking._compute_products.clear_cache()
    status, out, _ = commands.run(capsys, "check", "--json")
    checking._compute_products.clear_cache()
    products = json.loads(out)["products"]
    assert status == 1 and not products[0]["is_right"]
    missed = [x for x in products if x["is_right"]]
    # Products in bfloat16 are rounded even without the fault.
    assert not [x for x in missed if (fault, x["dtype"]) != ("rounded", "bfloat16")]


@pytest.mark.slow
def test_weights_that_decode_differently_are_found(small, monkeypatch, capsys):
    exact_dequantize, calls = ql.dequantize, []

    def faulty_dequantize(q):
        calls.append(q)
        w = exact_dequantize(q)
        return w if len(calls) % 2 else w.at[3, 5].add(w[3, 5] / 64)

    monkeypatch.setattr(ql, "dequantize", faulty_dequantize)
    status, out, _ = commands.run(capsys, "check")
    assert status == 1 and "'decodes_exactly': False" in out
