"""Scales by search, beside the quantizers of llama.cpp and llm-compressor, and GPTQ.

    python benchmarks/scales_peers.py [--markdown FILE]

All pack the linear layers of the encoder of `formats_quality.py` in 4-bit integers, in
blocks of 32 or 128 with a float16 scale. The numbers are the errors of the layers'
outputs, in percent, as there. What is measured on data comes from other rows of text.

llama.cpp's quantizer is the C function that `llama-quantize` calls for each tensor of
the type Q4_0, without and with an importance matrix, which is the mean squares of the
inputs. It is called in the library of the package `xllamacpp`.

GPTQ is a NumPy loop in this file (Frantar et al. 2023, algorithm 1). It rounds a kernel
row by row. After each row, it changes the rows that are not rounded yet, to make up for
the error of the outputs. The scales of a block are chosen when its first row is
reached, from the changed weights: by the rule of Q4_0, or by this library's search.

llm-compressor's GPTQ is its function `quantize_weight`, with the scales of
compressed-tensors, which follow the rule of `int4_f16`.

Needs the extra `interop`, and `pip install --no-deps llmcompressor loguru`, because
llm-compressor asks for other versions of transformers.
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
import torch
import xllamacpp
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from formats_model import read_chapters, split
from formats_quality import encoder_layers, mean_squares, percent, relative_error
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from timing import print_table
from tqdm import tqdm

import qlora_jax as ql

Q4_0 = gguf.GGMLQuantizationType.Q4_0
# GPTQ adds this share of the mean of the Hessian's diagonal to the diagonal.
DAMPING = 0.01
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


def quantize(
    kernel: np.ndarray, inputs: np.ndarray, fmt: str, block_size: int, scales: str
) -> ql.QTensor:
    """Packs with this library; "weighted" is a search weighted by mean squares."""
    importance = mean_squares([inputs])[0] if scales == "weighted" else None
    rule = "absmax" if scales == "absmax" else "search"
    return ql.quantize(
        jnp.asarray(kernel),
        fmt,
        block_size=block_size,
        scales=rule,
        importance=importance,
    )


def make_packer(fmt: str, block_size: int, scales: str) -> Packer:
    """Returns a packer that calls this library."""

    def pack(kernel: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(
            ql.dequantize(quantize(kernel, inputs, fmt, block_size, scales))
        )

    return pack


def make_gptq(fmt: str, block_size: int, scales: str) -> Packer:
    """Returns a packer that rounds to -8 to 7 by GPTQ."""

    def pack(kernel: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        # The squared error of the outputs is e' H e for the error e of a column.
        hessian = np.float64(inputs).T @ np.float64(inputs)
        hessian[np.diag_indices_from(hessian)] += DAMPING * np.diag(hessian).mean()
        # Row i of this upper triangle, divided by its diagonal, says by how much each
        # later row must change to make up best for an error of 1 in row i.
        factor = np.float32(np.linalg.cholesky(np.linalg.inv(hessian)).T)
        remaining, decoded = kernel.copy(), np.empty_like(kernel)
        for start in range(0, len(kernel), block_size):
            rows = slice(start, start + block_size)
            block = remaining[rows]  # a view, whose rows are changed in place
            packed = quantize(block, inputs[:, rows], fmt, block_size, scales)
            block_scales = np.float32(np.asarray(packed.scales)[0])
            errors = np.empty_like(block)
            upper = factor[rows, rows]
            for i, row in enumerate(block):
                codes = np.clip(np.round(row / block_scales), -8, 7)
                decoded[start + i] = codes * block_scales
                errors[i] = (row - decoded[start + i]) / upper[i, i]
                block[i + 1 :] -= np.outer(upper[i, i + 1 :], errors[i])
            remaining[rows.stop :] -= factor[rows, rows.stop :].T @ errors
        return decoded

    return pack


def make_llm_compressor(group_size: int) -> Packer:
    """Returns a packer that calls llm-compressor's GPTQ."""
    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=True,
        strategy="group",
        group_size=group_size,
    )

    def pack(kernel: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        weights = torch.tensor(kernel.T)  # [N, K]
        groups = weights.reshape(len(weights), -1, group_size)
        scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        scales = scales.half().float()  # as files store them
        hessian = torch.tensor(2 * inputs.T @ inputs / len(inputs))
        decoded, _, _ = quantize_weight(
            weights[None], hessian[None], scales[None], zero_points[None], None, args
        )
        return decoded[0].numpy().T

    return pack


PACKERS: dict[tuple[str, str, str], Packer] = {
    ("llama.cpp, Q4_0", "4.500", ""): make_llama_cpp(False),
    ("llama.cpp, Q4_0, imatrix", "4.500", "mean squares"): make_llama_cpp(True),
    ("q4_0", "4.500", ""): make_packer("q4_0", 32, "absmax"),
    ("q4_0, search", "4.500", ""): make_packer("q4_0", 32, "search"),
    ("q4_0, search", "4.500", "mean squares"): make_packer("q4_0", 32, "weighted"),
    ("q4_0, GPTQ", "4.500", "products"): make_gptq("q4_0", 32, "absmax"),
    ("q4_0, GPTQ, search", "4.500", "products"): make_gptq("q4_0", 32, "weighted"),
}
for size, bits in ((32, "4.500"), (128, "4.125")):
    name = f"int4_f16, {size}"
    PACKERS |= {
        (name, bits, ""): make_packer("int4_f16", size, "absmax"),
        (f"{name}, search", bits, ""): make_packer("int4_f16", size, "search"),
        (f"{name}, search", bits, "mean squares"): make_packer(
            "int4_f16", size, "weighted"
        ),
        (f"{name}, llm-compressor's GPTQ", bits, "products"): make_llm_compressor(size),
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
