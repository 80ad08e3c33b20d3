"""Formats of servers against compressed-tensors itself."""

import importlib.util
import pathlib

import helpers
import numpy as np
import pytest

pytest.importorskip("compressed_tensors")

DATA = pathlib.Path(__file__).parents[1] / "data" / "compressed_tensors"
_SPEC = importlib.util.spec_from_file_location("make_golden", DATA / "make.py")
make = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make)


@pytest.mark.parametrize("name", make.SCHEMES)
def test_stored_bits_are_equal(name):
    golden = np.load(DATA / "golden.npz")
    stored = {f"{name} {k}": x for k, x in make.stored(name, make.weights()).items()}
    helpers.assert_same_bits(stored, {key: golden[key] for key in stored})
    rng = np.random.default_rng(1)
    w = rng.standard_normal((96, 1024)) * np.exp(rng.normal(size=(96, 1024)))
    for one in (w, w * 1e-3, np.round(w * 16) / 16):
        one = one.astype(np.float32)
        helpers.check_compressed_tensors(name, one, make.stored(name, one))
