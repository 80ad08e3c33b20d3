"""Writes golden.npz: what compressed-tensors stores for fixed weights.

Run it in an environment with torch (CPU) and compressed-tensors:

    python tests/data/compressed_tensors/make.py

The file has, for each scheme, `packed` and `scale` (and `global_scale`) as its
compressor writes them, and `values`, the weights that it decodes in float32. Weights
are [N, K].
tests/interop/test_compressed_tensors.py calls `stored` on other weights.
"""

import pathlib

import numpy as np
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import (
    PackedQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

FOLDER = pathlib.Path(__file__).parent


def _int4(group_size: int) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=4,
        strategy="group",
        group_size=group_size,
        scale_dtype=torch.float16,
    )


SCHEMES = {
    "int4_f16 32": (_int4(32), PackedQuantizationCompressor),
    "int4_f16 64": (_int4(64), PackedQuantizationCompressor),
    "int4_f16 128": (_int4(128), PackedQuantizationCompressor),
    "mxfp4 32": (MXFP4A16["weights"], MXFP4PackedCompressor),
    "nvfp4 16": (NVFP4A16["weights"], NVFP4PackedCompressor),
}


def stored(name: str, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what a scheme stores for weights [N, K], and the decoded weights."""
    args, compressor = SCHEMES[name]
    w = torch.from_numpy(weights)
    blocks = w.unflatten(-1, (-1, args.group_size))
    global_scale = None
    if name.startswith("nvfp4"):
        global_scale = generate_gparam(w.amin(), w.amax())
    scale, _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), args, global_scale=global_scale
    )
    state = {"weight": w, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    written = compressor.compress(state, scheme)
    packed = written["weight_packed"]
    if packed.dtype == torch.int32:
        codes = unpack_from_int32(packed, 4, w.shape).float()
    else:
        codes = unpack_fp4_from_uint8(packed, *w.shape, dtype=torch.float32)
    values = dequantize(codes, scale, args=args, global_scale=global_scale)
    stored_scale = written["weight_scale"]
    if args.scale_dtype == torch.float16:
        stored_scale = stored_scale.to(torch.float16)
    if stored_scale.dtype == torch.float8_e4m3fn:
        stored_scale = stored_scale.view(torch.uint8)
    tensors = {"packed": packed, "scale": stored_scale, "values": values}
    if global_scale is not None:
        tensors["global_scale"] = global_scale
    return {key: value.numpy() for key, value in tensors.items()}


def weights() -> np.ndarray:
    """Returns [8, 256]: normal weights of several sizes, ties, zeros, lone values."""
    rng = np.random.default_rng(0)
    sizes = np.float32(2.0) ** rng.integers(-9, 6, (8, 16, 1))
    w = rng.standard_normal((8, 16, 16), np.float32) * sizes
    w = w.reshape(8, 256).astype(np.float32)
    # Ties: halves and quarters in blocks whose largest magnitude is 7.5, 6 or 4.
    ties = np.arange(-16, 16, dtype=np.float32) / 4
    for row, largest in enumerate((7.5, 6, 4, -7.5)):
        w[row, :32] = ties
        w[row, 0] = w[row, 16] = largest
    w[4, :128] = 0
    w[5, :64] = 0
    w[5, 7] = -0.375
    w[6, :32] = -(2.0**-5)
    w[7, :32] *= np.float32(1e-4)
    w[7, 64:128] = np.linspace(1.7, 1.8, 64)  # about 1.75: the next power of two
    return w


if __name__ == "__main__":
    arrays = {"weights": weights()}
    for name in SCHEMES:
        tensors = stored(name, arrays["weights"])
        arrays |= {f"{name} {key}": value for key, value in tensors.items()}
    np.savez_compressed(FOLDER / "golden.npz", **arrays)
