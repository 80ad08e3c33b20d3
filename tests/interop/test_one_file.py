"""The file of a merge-aware adapter has the loss of training in programs that serve it.

They compute in float32 here, so that losses differ by rounding only. llama.cpp can do
so with a copy of the file, in which the weights are decoded.
"""

import functools

import gguf
import numpy as np
import pytest
import torch
from clients import llama_cpp, log_probabilities, mlx_logits
from helpers import assert_same_bits
from llama import logits_of
from one_file_helpers import CASES, TOKENS, VOCAB_SIZE, mean_loss, train
from stored import export, tensors_of
from tolerances import assert_close
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import qlora_jax as ql

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers
    pytest.mark.without_noise,  # which would round other weights to another code
]


@pytest.fixture(scope="module")
def train_once(tmp_path_factory):
    """Returns `train`, which remembers the models."""
    folder = tmp_path_factory.mktemp("one_file") / "float"
    return functools.cache(functools.partial(train, folder))


def check_loss(trained, logits):
    """Checks the loss of a program, and that this can fail."""
    loss = mean_loss(logits)
    assert_close(loss, trained.loss)
    # Ordinary adapters with the same factors have another loss beside their base.
    ordinary = mean_loss(trained.logits(trained.base, trained.ordinary))
    with pytest.raises(AssertionError, match="roundings explain"):
        assert_close(loss, ordinary)


TRANSFORMERS = [k for k, x in CASES.items() if x.layout not in ("awq", "gguf")]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, train_once, tmp_path):
    trained = train_once(CASES[name])
    folder, options = trained.save(tmp_path / "file"), {}
    if name in ("mxfp4", "nvfp4"):
        # Otherwise, CPUs compute with E2M1 in bfloat16.
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    from_pretrained = AutoModelForCausalLM.from_pretrained
    model = from_pretrained(folder, dtype=torch.float32, **options)
    if name == "nf4 from bfloat16":
        # With inputs in float32, bitsandbytes would decode to float32.
        model = model.dequantize().float()
    # In training mode, bitsandbytes does not pack the weights again (llama.py).
    check_loss(trained, logits_of(model.train(), TOKENS))


def test_mlx_lm(train_once, tmp_path):
    trained = train_once(CASES["int4 for AWQ"])
    folder = trained.save(tmp_path / "file")
    check_loss(trained, mlx_logits(TOKENS, folder, dtype="float32"))


def test_llama_cpp(train_once, tmp_path):
    trained, decoded = train_once(CASES["q4_0"]), tmp_path / "decoded.gguf"
    file = trained.save(tmp_path / "file")
    decode_gguf(file, decoded)
    check_loss(trained, exact := log_probs_of(decoded))
    # llama.cpp rounds the inputs of weights in Q4_0 to 8 bits, which are about those of
    # bfloat16, in seven products a layer.
    served = log_probs_of(file)
    assert_close(served, exact, dtype="bfloat16", roundings=14)
    ordinary = mean_loss(trained.logits(trained.base, trained.ordinary))
    error = abs(mean_loss(served) - trained.loss)
    assert error < abs(mean_loss(served) - ordinary)


@pytest.mark.parametrize("name", ["nf4", "q4_0"])
def test_the_command_writes_the_same_file(name, train_once, tmp_path):
    trained, adapter = train_once(CASES[name]), tmp_path / "adapter.safetensors"
    ql.io.save(adapter, trained.lora, trained.qlora)
    want, out = trained.save(tmp_path / "file"), tmp_path / "out"
    out = out.with_suffix(want.suffix)
    written = export(trained.folder, None, out, adapter)
    assert written.format == trained.case.layout
    if out.is_dir():
        assert_same_bits(tensors_of(out), tensors_of(want))
    else:
        assert out.read_bytes() == want.read_bytes()


def decode_gguf(file, path):
    """Writes a copy of a GGUF file with all tensors in F32, by gguf-py."""
    reader = gguf.GGUFReader(file)
    fields = dict(reader.fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        if not name.startswith("GGUF."):  # the writer counts the tensors itself
            value_type, *_, item_type = (*field.types, None)[:3]
            writer.add_key_value(name, field.contents(), value_type, item_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probs_of(file):
    """Returns llama.cpp's log-probabilities after each of `TOKENS` but the last."""
    with llama_cpp(file) as ask:
        return np.array(
            [
                [
                    log_probabilities(ask, row[:end], VOCAB_SIZE)
                    for end in range(1, len(row) + 1)
                ]
                for row in TOKENS.tolist()
            ]
        )
