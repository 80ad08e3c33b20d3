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
