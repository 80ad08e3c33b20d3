"""4-bit weights in bitsandbytes' files. tests/interop compares with the library."""

import jax
import jax.numpy as jnp
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
    # `bnb_4bit_quant_storage` stores the same bytes in arrays of another dtype.
    for storage in (jnp.bfloat16, jnp.float16, jnp.float32):
        arrays = {name: np.asarray(x) for name, x in tensors.items()}
        arrays["up.weight"] = arrays["up.weight"].reshape(-1).view(storage)[:, None]
        path = tmp_path.parent / f"{tmp_path.name}.safetensors"
        ql.io.write_safetensors(path, arrays)
        for source in (arrays, path):
            loaded = ql.io.load(source, names, like, progress=False)["up"]["kernel"]
            np.testing.assert_array_equal(loaded.codes, q.codes)
    loaded = ql.io.load(tmp_path, names, like, progress=False)
    np.testing.assert_array_equal(ql.dequantize(loaded["up"]["kernel"]), want.T)


def test_a_weight_that_is_also_stored_in_float_is_refused():
    blocks, scales = np.zeros((2, 4, 1, 16), np.uint8), np.ones((2, 4, 1), np.uint8)
    tensors = {"up_blocks": blocks, "up_scales": scales}
    tensors["up.1"] = np.ones((4, 32), np.float32)
    with pytest.raises(ql.io.CheckpointError, match="must not also have up.1."):
        ql.io.packed_tensors(tensors)


def test_a_weight_with_two_states_is_refused(tmp_path):
    base = {"up": {"kernel": ql.quantize(weights(Case((64, 8))), "nf4")}}
    names = ql.io.Names({"up/kernel": "up.weight"})
    ql.io.save_bitsandbytes(tmp_path, base, names, {}, progress=False)
    tensors = {k: np.asarray(x) for k, x in ql.io.open_safetensors(tmp_path).items()}
    state = tensors["up.weight.quant_state.bitsandbytes__nf4"]
    text = state.tobytes().replace(b'"nf4"', b'"fp4"')
    second_state = np.frombuffer(text, np.uint8)
    tensors["up.weight.quant_state.bitsandbytes__fp4"] = second_state
    with pytest.raises(ql.io.CheckpointError, match="\n  up.weight: `weight` must be"):
        ql.io.packed_tensors(tensors)
