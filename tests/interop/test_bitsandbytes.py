"""4-bit checkpoints of transformers and bitsandbytes, in and out."""

import json

import numpy as np
import pytest

pytest.importorskip("bitsandbytes")
pytest.importorskip("transformers")

import llama
from safetensors.torch import load_file

import qlora_jax as ql
from qlora_jax.io import load

PACKED = r".*_proj/kernel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models by name, each made once."""
    made = {}
    root = tmp_path_factory.mktemp("models")

    def get(fmt=None, nested=False):
        key = f"{fmt}-{nested}"
        if key not in made:
            folder = root / key
            if fmt is None:
                made[key] = folder, llama.save_float(folder)
            else:
                source, config = get()
                llama.save_4bit(folder, source, fmt, nested)
                made[key] = folder, config
        return made[key]

    return get


def definition(stored, name):
    """Dequantizes by the definition: table value times scale, in float32."""
    state = json.loads(
        next(
            bytes(x.numpy().tobytes())
            for key, x in stored.items()
            if key.startswith(f"{name}.quant_state.")
        )
    )
    codes = stored[name].numpy().reshape(-1)
    codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    scales = stored[f"{name}.absmax"].numpy()
    if "nested_offset" in state:
        table = stored[f"{name}.nested_quant_map"].numpy()
        nested = np.repeat(stored[f"{name}.nested_absmax"].numpy(), 256)
        scales = table[scales] * nested[: scales.size]
        scales = scales + np.float32(state["nested_offset"])
    values = stored[f"{name}.quant_map"].numpy()[codes]
    scales = np.repeat(scales, state["blocksize"])
    return (values * scales[: values.size]).reshape(state["shape"])


CASES = [("nf4", True), ("fp4", False), ("nf4", False), ("fp4", True)]


@pytest.mark.parametrize("fmt, nested", CASES)
def test_in(folders, fmt, nested):
    folder, config = folders(fmt, nested)
    base = load(folder, llama.NAMES, llama.shapes(config), progress=False)
    stored = load_file(folder / "model.safetensors")
    for path in llama.LINEAR:
        q = base["layers"]
        for key in path.split("/"):
            q = q[key]
        q = q["kernel"]
        assert (q.fmt, q.block_size, q.double_quant) == (fmt, 64, nested)
        for layer, w in enumerate(np.asarray(ql.dequantize(q))):
            name = f"model.layers.{layer}.{path.replace('/', '.')}.weight"
            np.testing.assert_array_equal(w.T, definition(stored, name))
            # Bytes are moved.
            mine = np.asarray(q.codes[layer]).T.reshape(-1, 1)
            np.testing.assert_array_equal(mine, stored[name].numpy())
    ours, theirs = llama.our_logits(config, base), llama.their_logits(folder)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 0.5
