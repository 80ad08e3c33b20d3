"""Formats of servers against the compressed-tensors package."""

import importlib.util
import pathlib

import helpers
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import torch
from tolerances import assert_close
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names

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
    for weight in (w, w * 1e-3, np.round(w * 16) / 16):
        weight = weight.astype(np.float32)
        helpers.check_compressed_tensors(name, weight, make.stored(name, weight))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", ["int4_f16 64", "mxfp4 32", "nvfp4 16"])
def test_transformers_computes_what_is_written(name, tmp_path):
    source, folder = llama.save_float(tmp_path / "float"), tmp_path / "packed"
    fmt, size = name.split()
    qlora = ql.QLoRAConfig(fmt=fmt, block_size=int(size), targets=llama.PACKED)
    config, base = load(source, qlora=qlora, progress=False)
    names = decoder_names(config)
    layout = "compressed-tensors"
    ql.io.save_packed(folder, base, names, source, layout, progress=False)
    is_int = fmt == "int4_f16"
    config, base = load(folder, jnp.float32 if is_int else None, progress=False)
    ours = llama.our_logits(config, ql.dequantize(base))
    # On CPUs transformers runs E2M1 in bfloat16, or decodes it to that.
    decoded = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    options = {} if is_int else decoded
    from_pretrained = AutoModelForCausalLM.from_pretrained
    theirs = llama.logits_of(from_pretrained(folder, dtype=torch.float32, **options))
    assert_close(ours, theirs)
    theirs = llama.logits_of(from_pretrained(folder))  # in the dtype of the config
    assert_close(ours, theirs, dtype="bfloat16", roundings=8)


def test_zero_points_are_read_in_float():
    w = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32) + 0.3
    w, half = make.torch.from_numpy(w), make.torch.float16
    args = dict(num_bits=4, strategy="group", group_size=32, symmetric=False)
    args = make.QuantizationArgs(**args, scale_dtype=half)
    groups = w.unflatten(-1, (-1, 32))
    scale, zero = make.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    scheme = make.QuantizationScheme(targets=["Linear"], weights=args)
    compressed = make.PackedQuantizationCompressor.compress(state, scheme)
    codes = make.unpack_from_int32(compressed["weight_packed"], 4, w.shape).float()
    expected = make.dequantize(codes, scale, zero, args).float().numpy()
    compressed["weight_scale"] = compressed["weight_scale"].to(half)
    tensors = {f"up.{part}": x.numpy() for part, x in compressed.items()}
    names = ql.io.Names({"up/kernel": "up.weight"})
    like = {"up": {"kernel": jnp.ones((128, 16))}}
    with pytest.raises(ql.io.CheckpointError, match="zero points other than 8"):
        ql.io.load(tensors, names, like, progress=False)
    options: dict = dict(dtype="float32", recode=True, progress=False)
    weight = ql.io.load(tensors, names, like, **options)["up"]["kernel"]
    helpers.assert_same_bits(np.asarray(weight), expected.T)
