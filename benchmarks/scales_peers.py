"""Scales by search, beside llama.cpp's quantizer, at the same bits.

    python benchmarks/scales_peers.py [--markdown FILE]

All pack the linear layers of the encoder of `formats_quality.py` in 4-bit integers, in
blocks of 32 or 128 with a float16 scale. The numbers are the errors of the layers'
outputs, in percent, as there. What is measured on data comes from other rows of text.

llama.cpp's quantizer is the C function that `llama-quantize` calls for each tensor of
the type Q4_0, without and with an importance matrix, which is the mean squares of the
inputs. It is called in the library of the package `xllamacpp`.

Needs the extra `train`, and `pip install gguf xllamacpp`.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import ctypes
import pathlib
import tempfile
from collections.abc import Callable

import gguf
import jax.numpy as jnp
import numpy as np
import xllamacpp
from formats_model import read_chapters, split
from formats_quality import encoder_layers, mean_squares, percent, relative_error
from timing import print_table
from tqdm import tqdm

import qlora_jax as ql

Q4_0 = gguf.GGMLQuantizationType.Q4_0
HEADER = ["packing", "bits a weight", "data", "outputs, %"]

# Maps a kernel `[K, N]` and its inputs `[M, K]` on other text to decoded weights.
Packer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def open_ggml() -> ctypes.CDLL:
    """Returns the C functions of llama.cpp, which the package's library exports."""
    (path,) = pathlib.Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.argtypes = arguments
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def make_llama_cpp(has_importance: bool) -> Packer:
    """Returns a packer that calls llama.cpp's quantizer for Q4_0."""
    ggml = open_ggml()

    def pack(kernel: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(kernel.T)  # [N, K], as in a file
        packed = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, Q4_0), np.uint8)
        importance = np.ascontiguousarray(np.square(inputs).mean(0))
        size = ggml.ggml_quantize_chunk(
            int(Q4_0),
            rows.ctypes.data,
            packed.ctypes.data,
            0,
            *rows.shape,
            importance.ctypes.data if has_importance else None,
        )
        assert size == packed.nbytes
        return gguf.dequantize(packed, Q4_0).T

    return pack


def make_packer(fmt: str, block_size: int, scales: str) -> Packer:
    """Returns a packer that calls this library."""
    rule = "absmax" if scales == "absmax" else "search"

    def pack(kernel: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        importance = mean_squares([inputs])[0] if scales == "weighted" else None
        options = {"scales": rule, "importance": importance}
        q = ql.quantize(jnp.asarray(kernel), fmt, block_size=block_size, **options)
        return np.asarray(ql.dequantize(q))

    return pack


PACKERS: dict[tuple[str, str, str], Packer] = {
    ("llama.cpp, Q4_0", "4.500", ""): make_llama_cpp(False),
    ("llama.cpp, Q4_0, imatrix", "4.500", "mean squares"): make_llama_cpp(True),
    ("q4_0", "4.500", ""): make_packer("q4_0", 32, "absmax"),
    ("q4_0, search", "4.500", ""): make_packer("q4_0", 32, "search"),
    ("q4_0, search", "4.500", "mean squares"): make_packer("q4_0", 32, "weighted"),
}
for size, bits in ((32, "4.500"), (128, "4.125")):
    name = f"int4_f16, {size}"
    PACKERS |= {
        (name, bits, ""): make_packer("int4_f16", size, "absmax"),
        (f"{name}, search", bits, ""): make_packer("int4_f16", size, "search"),
        (f"{name}, search", bits, "mean squares"): make_packer(
            "int4_f16", size, "weighted"
        ),
    }


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", metavar="FILE", help="write the report here too")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        text = split(read_chapters())[1]
        layers, other_inputs = encoder_layers(pathlib.Path(scratch), text)
    rows = []
    for names, pack in tqdm(PACKERS.items(), unit="packing"):
        errors = [
            relative_error(x @ pack(np.asarray(kernel), np.asarray(inputs)), x @ kernel)
            for (kernel, x), inputs in zip(layers, other_inputs, strict=True)
        ]
        rows.append([*names, f"{percent(errors):.2f}"])
        print(*rows[-1], flush=True)
    print_table(HEADER, rows, args.markdown)


if __name__ == "__main__":
    main()
