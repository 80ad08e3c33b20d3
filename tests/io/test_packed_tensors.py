"""4-bit weights in bitsandbytes' files; tests/interop has the library as the judge."""

import jax
import numpy as np
import pytest
from helpers import Case, dequantize, weights

import qlora_jax as ql


@pytest.mark.parametrize(("fmt", "double_quant"), [("nf4", True), ("fp4", False)])
def test_rows_decode_to_what_was_packed(tmp_path, fmt, double_quant):
    q = ql.quantize(weights(Case((128, 24))), fmt, double_quant=double_quant)
    names = ql.io.Names({"up/kernel": "up.weight"})
    base, config = {"up": {"kernel": q}}, {"model_type": "mine"}
    ql.io.save_bitsandbytes(tmp_path, base, names, config, progress=False)
    tensors = ql.io.open_safetensors(tmp_path)
    tensor, want = ql.io.packed_tensors(tensors)["up.weight"], dequantize(q).T
    for rows in (slice(0, 24), slice(5, 7)):
        np.testing.assert_array_equal(tensor.decode(rows), want[rows])
    like = {"up": {"kernel": jax.ShapeDtypeStruct((128, 24), "float32")}}
    found = ql.io.load(tmp_path, names, like, progress=False)
    np.testing.assert_array_equal(ql.dequantize(found["up"]["kernel"]), want.T)
