"""4-bit checkpoints of transformers and bitsandbytes, in and out."""

import json

import numpy as np
import pytest

pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb
import jax
import llama
import torch
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


def packed(folder, config, fmt, nested):
    """Loads a float checkpoint and packs it as bitsandbytes does."""
    settings = ql.QLoRAConfig(targets=PACKED, fmt=fmt, double_quant=nested)
    shapes = llama.shapes(config)
    return load(folder, llama.NAMES, shapes, settings, progress=False)


@pytest.mark.parametrize("fmt, nested", CASES)
def test_out(folders, tmp_path, fmt, nested):
    source, config = folders()
    theirs, _ = folders(fmt, nested)
    base = packed(source, config, fmt, nested)
    out = tmp_path / "out"
    ql.io.save_bitsandbytes(out, base, llama.NAMES, source, progress=False)
    ours, wanted = (load_file(f / "model.safetensors") for f in (out, theirs))
    assert ours.keys() == wanted.keys()
    for name, x in wanted.items():
        found = ours[name]
        assert (found.dtype, found.shape) == (x.dtype, x.shape) or "state" in name
        if nested and name.endswith(".absmax"):
            difference = found.int() - x.int()
            assert (
                difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01
            )
        elif "quant_state" in name:
            found, x = (json.loads(bytes(y.numpy().tobytes())) for y in (found, x))
            offsets = found.pop("nested_offset", 0), x.pop("nested_offset", 0)
            np.testing.assert_allclose(*offsets, rtol=1e-6)
            assert found == x
        elif name.endswith("nested_absmax"):
            torch.testing.assert_close(found, x, rtol=1e-5, atol=0)
        else:
            assert torch.equal(found, x), name
    read = lambda f: json.loads((f / "config.json").read_text())
    ours, wanted = read(out), read(theirs)
    skipped = ours["quantization_config"].pop("llm_int8_skip_modules")
    del wanted["quantization_config"]["llm_int8_skip_modules"]
    assert ours == wanted and skipped == ["lm_head"]


def test_out_is_loaded_as_4bit(folders, tmp_path):
    source, config = folders()
    base = packed(source, config, "nf4", True)
    ql.io.save_bitsandbytes(
        tmp_path / "x",
        base,
        llama.NAMES,
        source,
        max_shard_bytes=50_000,
        progress=False,
    )
    assert len([*(tmp_path / "x").glob("*.safetensors")]) > 2
    model = llama.their_model(tmp_path / "x")
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.weight.dtype == torch.uint8
    assert type(model.lm_head) is torch.nn.Linear
    np.testing.assert_allclose(
        llama.our_logits(config, base), llama.logits_of(model), atol=1e-4
    )
    # And back: the same bytes.
    again = load(tmp_path / "x", llama.NAMES, llama.shapes(config), progress=False)
    for a, b in zip(*map(jax.tree.leaves, (base, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_out_with_a_layer_left_in_float(tmp_path, tied):
    config = llama.save_float(tmp_path / "float", tie_word_embeddings=tied)
    targets = (
        r".*(q|k|v|o|gate|up)_proj/kernel" if tied else r".*(_proj|lm_head)/kernel"
    )
    names = llama.TIED if tied else llama.NAMES
    base = load(
        tmp_path / "float",
        names,
        llama.shapes(config),
        ql.QLoRAConfig(targets=targets),
        progress=False,
    )
    ql.io.save_bitsandbytes(
        tmp_path / "x", base, names, tmp_path / "float", progress=False
    )
    model = llama.their_model(tmp_path / "x")
    is_packed = lambda layer: isinstance(layer, bnb.nn.Linear4bit)
    assert is_packed(model.model.layers[1].mlp.down_proj) is not tied
    assert is_packed(model.lm_head) is not tied
    np.testing.assert_allclose(
        llama.our_logits(config, base), llama.logits_of(model), atol=1e-4
    )


@pytest.mark.parametrize("width", [96, 100], ids=["smaller blocks", "float"])
def test_blocks_that_cross_rows(tmp_path, width):
    """One linear layer, since bitsandbytes' own CPU kernel is wrong for these."""
    torch.manual_seed(0)
    weight = torch.randn(6, width)
    for nested in (False, True):
        data, state = bnb.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=nested
        )
        stored = {"up.weight": data}
        stored |= {
            f"up.weight.{key}": x for key, x in state.as_dict(packed=True).items()
        }
        wanted = definition(stored, "up.weight")
        stored = {name: x.numpy() for name, x in stored.items()}
        names = ql.io.Names({"up/kernel": "up.weight"})
        like = {"up": {"kernel": jax.ShapeDtypeStruct((width, 6), "float32")}}
        with pytest.raises(ql.io.CheckpointError, match="Use recode=True"):
            load(stored, names, like, progress=False)
        kernel = load(stored, names, like, recode=True, progress=False)["up"]["kernel"]
        if width == 96:
            assert (kernel.block_size, kernel.double_quant) == (32, False)
        np.testing.assert_array_equal(np.asarray(ql.dequantize(kernel)).T, wanted)
        config = ql.QLoRAConfig(fmt="int8")
        kernel = load(stored, names, like, config, recode=True, progress=False)
        again = ql.quantize(wanted.T, "int8")
        np.testing.assert_array_equal(kernel["up"]["kernel"].codes, again.codes)
