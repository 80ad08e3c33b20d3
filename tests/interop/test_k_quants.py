"""K-quants beside llama.cpp: its own quantizer and decoders, and its server."""

import ctypes
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xllamacpp
from clients import llama_cpp, log_probabilities
from llama import our_logits
from tolerances import relative_error

from qlora_jax.llm.gguf.decoder_out import save_gguf
from qlora_jax.llm.gguf.k_quants import K_QUANTS, pack_k_quant
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.tiny import save_tiny

SHAPE = 64, 1024
RNG = np.random.default_rng(0)
WEIGHTS = {
    "normal": 0.02 * RNG.normal(size=SHAPE),
    "long tails": 0.02 * RNG.standard_t(4, size=SHAPE),
    "skewed": RNG.exponential(size=SHAPE),
    "all negative": RNG.normal(size=SHAPE) - 5,
    "mostly zeros": RNG.normal(size=SHAPE) * (RNG.random(SHAPE) < 0.1),
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "sliding_window": None}
MIXTRAL |= {"architectures": None}


@pytest.fixture(scope="module")
def ggml():
    """The C functions of llama.cpp, which the wheel's library exports."""
    folder = pathlib.Path(xllamacpp.__file__).parent
    (path,) = folder.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.argtypes = arguments
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    for fmt in K_QUANTS:
        decode = decoder_of(library, fmt)
        decode.argtypes, decode.restype = [pointer, pointer, count], None
    return library


def decoder_of(library, fmt):
    return getattr(library, f"dequantize_row_{fmt[0].lower()}{fmt[1:]}")


def pack_by_llama_cpp(ggml, x, fmt):
    kind = gguf.GGMLQuantizationType[fmt]
    packed = np.empty(gguf.quant_shape_to_byte_shape(x.shape, kind), np.uint8)
    pointers = x.ctypes.data, packed.ctypes.data
    size = ggml.ggml_quantize_chunk(int(kind), *pointers, 0, *x.shape, None)
    assert size == packed.nbytes
    return packed


def decode_by_llama_cpp(ggml, packed, fmt):
    decoded = np.empty(SHAPE, np.float32)
    decoder_of(ggml, fmt)(packed.ctypes.data, decoded.ctypes.data, decoded.size)
    return decoded


@pytest.mark.parametrize("fmt", K_QUANTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_errors_are_not_larger_than_those_of_llama_cpp(ggml, name, fmt):
    x = WEIGHTS[name].astype(np.float32)
    packed = pack_k_quant(x, fmt)
    decoded = decode_by_llama_cpp(ggml, packed, fmt)
    kind = gguf.GGMLQuantizationType[fmt]
    np.testing.assert_array_equal(decoded, gguf.dequantize(packed, kind))
    theirs = gguf.dequantize(pack_by_llama_cpp(ggml, x, fmt), kind)
    assert 0 < relative_error(decoded, x) <= relative_error(theirs, x)


@pytest.mark.parametrize("changes", [{}, MIXTRAL], ids=["llama", "mixtral"])
def test_llama_cpp_computes_with_the_weights_of_the_file(tmp_path, changes):
    """It rounds inputs to 8 bits, in blocks of 256 before weights in Q4_K and Q6_K."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 8}
    folder, path = (
        save_tiny(tmp_path / "model", **sizes, **changes),
        tmp_path / "x.gguf",
    )
    config, params = load(folder, progress=False)
    save_gguf(path, folder, params, fmt="Q4_K_M", progress=False)
    _, read_params = load(path, progress=False)
    stored = {x.tensor_type.name for x in gguf.GGUFReader(str(path)).tensors}
    expected = {"Q4_K", "Q6_K", "Q5_0", "Q8_0", "F32"}
    assert stored == (expected | {"Q5_K"} if changes else expected)
    tokens = np.random.default_rng(0).integers(3, 256, 32).tolist()
    with llama_cpp(path) as ask:
        got = log_probabilities(ask, tokens, config.vocab_size)

    def log_probs(params):
        logits = our_logits(config, params, tokens=jnp.asarray([tokens]))
        return np.asarray(jax.nn.log_softmax(logits[0, -1]))

    want, of_floats = log_probs(read_params), log_probs(params)
    assert relative_error(got, want) < relative_error(of_floats, want) / 4
