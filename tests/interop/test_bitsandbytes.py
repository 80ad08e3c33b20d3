"""4-bit checkpoints of transformers and bitsandbytes, in and out."""

import functools
import json

import bitsandbytes as bnb
import chex
import jax
import llama
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tolerances import assert_close, rounding

import qlora_jax as ql
from qlora_jax import io
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.trees.paths import leaves_by_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function that saves a model, in float or 4 bits, once."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def get(fmt=None, nested=False):
        folder = root / f"{fmt}-{nested}"
        if fmt is None:
            return llama.save_float(folder)
        return llama.save_4bit(folder, get(), fmt, nested)

    return get


def state_of(tensor):
    return json.loads(tensor.numpy().tobytes())


def definition(stored, name):
    """Dequantizes by the definition: table value times scale, in float32."""
    (state,) = (
        state_of(x) for key, x in stored.items() if key.startswith(f"{name}.quant_st")
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
def test_in(saved, fmt, nested):
    folder = saved(fmt, nested)
    config, base = load(folder, progress=False)
    stored = load_file(folder / "model.safetensors")
    for path in llama.LINEAR:
        q = leaves_by_path(base)[f"layers/{path}/kernel"]
        assert (q.fmt, q.block_size, q.double_quant) == (fmt, 64, nested)
        for layer, w in enumerate(np.asarray(ql.dequantize(q))):
            name = f"model.layers.{layer}.{path.replace('/', '.')}.weight"
            np.testing.assert_array_equal(w.T, definition(stored, name))
            # The bytes are only rearranged.
            mine = np.asarray(q.codes[layer]).T.reshape(-1, 1)
            np.testing.assert_array_equal(mine, stored[name].numpy())
    theirs = llama.logits_of(llama.their_model(folder))
    assert_close(llama.our_logits(config, base), theirs)
    assert theirs.std() > 0.5


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_in_from_another_storage(saved, tmp_path, storage):
    """FSDP needs arrays of one dtype: codes may be stored in it, with equal bytes."""
    folder = llama.save_4bit(
        tmp_path, saved(), "nf4", True, storage=getattr(torch, storage)
    )
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == getattr(torch, storage)
    params, expected = (
        load(x, progress=False)[1] for x in (folder, saved("nf4", True))
    )
    chex.assert_trees_all_equal(params, expected)


def test_in_of_8_bits_is_refused(saved, tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    options = dict(quantization_config=config, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved(), **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(io.CheckpointError, match="`load_in_8bit` must be false"):
        load(tmp_path, progress=False)


@pytest.mark.parametrize("shape", [(64, 128), (256, 512), (2048, 1024)])
def test_how_far_nested_scales_are_equal(shape):
    """docs/compatibility.md has these tolerances; bitsandbytes runs on the CPU."""
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32) / 50
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    q = ql.quantize(w.T, "nf4", block_size=64, double_quant=True)
    np.testing.assert_array_equal(np.asarray(q.codes).T.reshape(-1, 1), codes.numpy())
    ulp = np.spacing(np.float32(state.offset))
    assert abs(np.asarray(q.scale_offset) - state.offset.numpy()) <= 2 * ulp
    nested = state.state2.absmax.numpy()
    assert np.abs(np.asarray(q.scale_scales) - nested).max() <= 2 * ulp
    ours = np.asarray(q.scales).T.reshape(-1).astype(int)
    apart = ours != state.absmax.numpy()
    assert apart.mean() < 0.01

    # Where they differ, our code is the nearest one to the exact scale.
    table = state.state2.code.numpy().astype(np.float64)
    scales = np.abs(w.reshape(-1, 64)).max(1).astype(np.float64)
    group = np.repeat(np.asarray(q.scale_scales, np.float64), 256)[: len(scales)]
    exact = (scales - float(q.scale_offset)) / group
    distance = np.abs(table[:, None] - exact[apart])
    chosen = np.abs(table[ours[apart]] - exact[apart])
    # `exact` is rounded a few times in float32, and is at most 1.
    assert np.all(chosen <= distance.min(0) + rounding(16))


def test_nested_scales_whose_sum_is_exact_are_equal():
    """An exact sum does not depend on its order, which differs between processors."""
    w = np.random.default_rng(0).integers(-255, 256, (512, 1024)) / np.float32(256)
    w[:, ::64] = 0.5 + np.random.default_rng(1).integers(0, 2, (512, 16))
    w = w.astype(np.float32)
    _, state = bnb.functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    q = ql.quantize(w.T, "nf4", block_size=64, double_quant=True)
    np.testing.assert_array_equal(q.scale_offset, state.offset.numpy())
    np.testing.assert_array_equal(q.scale_scales, state.state2.absmax.numpy())


def packed(folder, **settings):
    """Packs a float checkpoint; returns its config, base and names."""
    settings = {"targets": llama.PACKED} | settings
    config, base = load(folder, qlora=ql.QLoRAConfig(**settings), progress=False)
    return config, base, decoder_names(config)


@pytest.mark.parametrize("fmt, nested", CASES)
def test_out(saved, tmp_path, fmt, nested):
    source, theirs, out = saved(), saved(fmt, nested), tmp_path / "out"
    _, base, names = packed(source, fmt=fmt, double_quant=nested)
    io.save_bitsandbytes(out, base, names, source, progress=False)
    ours, expected = (load_file(f / "model.safetensors") for f in (out, theirs))
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        tensor = ours[name]
        assert (tensor.dtype, tensor.shape) == (x.dtype, x.shape) or "state" in name
        if nested and name.endswith(".absmax"):
            difference = (tensor.int() - x.int()).abs()
            assert difference.max() <= 1 and (difference != 0).float().mean() < 0.01
        elif "quant_state" in name:
            tensor, x = map(state_of, (tensor, x))
            offsets = tensor.pop("nested_offset", 0), x.pop("nested_offset", 0)
            assert_close(*offsets, terms=64)
            assert tensor == x
        elif name.endswith("nested_absmax"):
            torch.testing.assert_close(tensor, x, rtol=1e-5, atol=0)
        else:
            assert torch.equal(tensor, x), name

    def read_config(f):
        return json.loads((f / "config.json").read_text())

    ours, expected = read_config(out), read_config(theirs)
    skipped = ours["quantization_config"].pop("llm_int8_skip_modules")
    del expected["quantization_config"]["llm_int8_skip_modules"]
    # mlx-lm reads the older key.
    expected["rope_theta"] = expected["rope_parameters"]["rope_theta"]
    assert ours == expected and skipped == ["lm_head"]


def assert_served(folder, config, base):
    """Checks the logits of transformers with bitsandbytes; returns their model."""
    model = llama.their_model(folder)
    ours, theirs = llama.our_logits(config, base), llama.logits_of(model)
    assert_close(ours, theirs)
    return model


def test_out_is_loaded_as_4bit(saved, tmp_path):
    config, base, names = packed(saved())
    options = dict(max_shard_bytes=50_000, progress=False)
    io.save_bitsandbytes(tmp_path, base, names, saved(), **options)
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    model = assert_served(tmp_path, config, base)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, bnb.nn.Linear4bit) and layer.weight.dtype == torch.uint8
    assert type(model.lm_head) is torch.nn.Linear
    # And back: the same bytes.
    chex.assert_trees_all_equal(load(tmp_path, progress=False)[1], base)


@pytest.mark.parametrize("tied", [False, True])
def test_out_with_a_layer_left_in_float(tmp_path, tied):
    source = llama.save_float(tmp_path / "float", tie_word_embeddings=tied)
    chosen = r"(q|k|v|o|gate|up)_proj" if tied else r"(_proj|lm_head)"
    config, base, names = packed(source, targets=f".*{chosen}/kernel")
    io.save_bitsandbytes(tmp_path / "x", base, names, source, progress=False)
    model = assert_served(tmp_path / "x", config, base)

    def is_packed(layer):
        return isinstance(layer, bnb.nn.Linear4bit)

    assert is_packed(model.model.layers[1].mlp.down_proj) is not tied
    assert is_packed(model.lm_head) is not tied


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("width", [96, 100], ids=["smaller blocks", "float"])
def test_blocks_that_cross_rows(width, nested):
    """One linear layer, since bitsandbytes' own CPU kernel is wrong for these."""
    torch.manual_seed(0)
    data, state = bnb.functional.quantize_4bit(
        torch.randn(6, width), quant_type="nf4", compress_statistics=nested
    )
    parts = state.as_dict(packed=True).items()
    stored = {"up.weight": data} | {f"up.weight.{key}": x for key, x in parts}
    expected = definition(stored, "up.weight")
    names = io.Names({"up/kernel": "up.weight"})
    like = {"up": {"kernel": jax.ShapeDtypeStruct((width, 6), "float32")}}
    load_kernel = functools.partial(
        io.load, {name: x.numpy() for name, x in stored.items()}, names, like
    )
    with pytest.raises(io.CheckpointError, match="Use recode=True"):
        load_kernel(progress=False)
    kernel = load_kernel(recode=True, progress=False)["up"]["kernel"]
    np.testing.assert_array_equal(np.asarray(ql.dequantize(kernel)).T, expected)
    if width == 96:
        assert (kernel.block_size, kernel.double_quant) == (32, False)
        config = ql.QLoRAConfig(fmt="int8", block_size=32)
        kernel = load_kernel(config, recode=True, progress=False)["up"]["kernel"]
        again = ql.quantize(expected.T, "int8", block_size=32)
        np.testing.assert_array_equal(kernel.codes, again.codes)
