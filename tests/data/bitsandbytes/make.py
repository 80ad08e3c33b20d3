"""Writes golden.npz and golden.json: what bitsandbytes stores for fixed weights.

Run it in a separate environment with torch (CPU) and bitsandbytes:

    python tests/data/bitsandbytes/make.py

Weights have the layout of bitsandbytes, [N, K] with K contracted. Codes, absmax, nested
codes, nested absmax and offset are what bitsandbytes returns. Dequantized values are
*not* taken from its kernel, which reads wrong scales for some shapes on AVX512: they
are its definition, table * absmax in float32 and one rounding to the weight's dtype.
The JSON holds their digests, and notes per case whether the kernel agreed.

bitsandbytes lets blocks run across rows. Where K is not a multiple of the block size,
each row is therefore quantized as a separate tensor, and double quantization gets the
absmax values of all rows, row after row.
"""

import hashlib
import json
import pathlib

import bitsandbytes
import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.backends.default import ops

FOLDER = pathlib.Path(__file__).parent
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def digest(x: torch.Tensor) -> str:
    """Returns the SHA-256 of a tensor's bytes, row-major and little-endian."""
    data = x.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def ties(fmt: str) -> np.ndarray:
    """Returns [N, 256] weights on, just below and just above every code boundary.

    A block's largest magnitude is a power of two, so that scaling is exact.
    """
    bounds = ops._get_4bit_quantize_bounds(fmt, torch.device("cpu"))[0].numpy()
    tiny = np.float32(1e-20)

    def add_neighbors(s):
        return np.where(bounds == 0, s * tiny, np.nextafter(bounds, s))

    around = map(add_neighbors, np.float32([-2, 2]))
    edge = np.concatenate([bounds, *around, [0.0, -0.0, 1.0]]).astype(np.float32)
    edge = np.resize(edge, 64)
    edge[-1] = 1.0
    blocks = [edge * np.float32(2.0) ** e for e in (0, 1, -1, 7, -9, 20, -30, 3)]
    blocks += [-block for block in blocks]
    return np.stack(blocks).reshape(4, 256).astype(np.float32)


def blocks_of_all_kinds() -> np.ndarray:
    """Returns [6, 256] weights: zeros, constants, lone values, tiny and huge blocks.

    Nothing here is denormal, nor is the reciprocal of a block's largest magnitude.
    """
    rng = np.random.default_rng(7)
    w = rng.standard_normal((24, 64), dtype=np.float32)
    w[0], w[1], w[2], w[3], w[5] = 0.0, 0.25, -3.0, 0.0, -0.0
    w[3, 17] = -1e-3
    w[4] = np.where(np.arange(64) % 2, 0.0, w[4])
    w[6:10] *= np.float32([[1e-30], [1e-20], [1e20], [1e30]])
    w[10] = np.round(w[10] * 2) / 2
    w[11, :63] *= np.float32(1e-6)
    return w.reshape(6, 256)


def extremes() -> np.ndarray:
    """Returns [3, 64]: blocks that a library gets wrong if it flushes denormals.

    Row 0 is denormal throughout, row 1 has a largest magnitude just above the smallest
    normal number, row 2 has one whose reciprocal is denormal.
    """
    rng = np.random.default_rng(8)
    w = np.clip(rng.standard_normal((3, 64), dtype=np.float32), -2.5, 2.5)
    return w * np.array([[1e-40], [1e-38], [1e38]], np.float32)


def quantize(w: torch.Tensor, fmt: str, block_size: int) -> dict[str, torch.Tensor]:
    """Returns the stored arrays of `w` [N, K], row by row where K % block_size != 0."""
    n, k = w.shape
    parts = w if k % block_size else [w]
    out = [
        bnb.quantize_4bit(part, blocksize=block_size, quant_type=fmt) for part in parts
    ]
    absmax = torch.cat([state.absmax for _, state in out])
    offset = absmax.mean()
    nested, nested_state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    if k % block_size == 0:  # One call for all rows must store the same.
        settings = dict(quant_type=fmt, compress_statistics=True)
        _, state = bnb.quantize_4bit(w, blocksize=block_size, **settings)
        assert torch.equal(state.absmax, nested)
        assert torch.equal(state.state2.absmax, nested_state.absmax)
        assert torch.equal(state.offset, offset)
    return {
        "codes": torch.cat([codes.reshape(-1) for codes, _ in out]).reshape(n, -1),
        "absmax": absmax.reshape(n, -1),
        "nested_codes": nested.reshape(n, -1),
        "nested_absmax": nested_state.absmax,
        "offset": offset,
    }


def decode(stored: dict[str, torch.Tensor], absmax: torch.Tensor, fmt, block_size, k):
    """Returns table * absmax in float32, [N, K]."""
    codes = stored["codes"]
    codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(len(codes), -1)[:, :k]
    table = bnb.get_4bit_type(fmt, device="cpu")
    return table[codes.long()] * absmax.repeat_interleave(block_size, dim=1)[:, :k]


def nested_scales(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the float32 scales that double-quantized storage decodes to."""
    table = bnb.create_dynamic_map()
    flat = table[stored["nested_codes"].reshape(-1).long()]
    steps = stored["nested_absmax"].repeat_interleave(256)[: len(flat)]
    return (flat * steps + stored["offset"]).reshape(stored["absmax"].shape)


def kernel_agrees(stored, values, fmt, block_size) -> bool | None:
    """Returns whether bitsandbytes' own kernel gives `values`; None if not run."""
    if values.shape[1] % block_size:
        return None
    arrays = stored["codes"].reshape(-1, 1), stored["absmax"].reshape(-1)
    settings = block_size, fmt, values.shape, values.dtype
    decoded = torch.ops.bitsandbytes.dequantize_4bit.default(*arrays, *settings)
    return bool(torch.equal(decoded.reshape(values.shape), values))


def cases() -> list[dict]:
    """Returns the name, format, dtype, block size, shape and input of every case."""
    table = []
    for fmt in ("nf4", "fp4"):
        for dtype in DTYPES:
            common = {"fmt": fmt, "dtype": dtype}
            for i, block in enumerate(BLOCK_SIZES):
                k = max(512, 2 * block)
                shape = [12288 // k if k < 4096 else 16384 // k, k]
                table.append(common | {"block_size": block, "shape": shape, "seed": i})
            # The last shape but one has 576 blocks: 3 nested blocks, the last partial.
            ragged = [(64, 5, 96), (64, 7, 100), (64, 3, 65), (64, 4, 1), (32, 6, 33)]
            ragged += [(32, 96, 160 + 16), (4096, 2, 5000)]
            for i, (block, n, k) in enumerate(ragged):
                sizes = {"block_size": block, "shape": [n, k], "seed": 100 + i}
                table.append(common | sizes)
            for array in (f"ties_{fmt}", "kinds", "extremes"):
                table.append(common | {"block_size": 64, "array": array})
            for block in (32, 64):  # with 64, half a block is left over
                table.append(common | {"block_size": block, "array": "zeros"})
    return table


def quality() -> list[dict]:
    """Returns the mean errors on N(0, 1), [1024, 1024], block 64."""
    w = np.random.default_rng(2024).standard_normal((1024, 1024), dtype=np.float32)
    w = torch.from_numpy(w)
    rows = []
    for fmt in ("nf4", "fp4"):
        stored = quantize(w, fmt, 64)
        for double_quant in (False, True):
            absmax = nested_scales(stored) if double_quant else stored["absmax"]
            error = (decode(stored, absmax, fmt, 64, 1024) - w).double()
            means = {"mean_abs": error.abs(), "mean_squared": error.square()}
            means = {name: x.mean().item() for name, x in means.items()}
            rows.append({"fmt": fmt, "double_quant": double_quant} | means)
    return rows


def main() -> None:
    """Writes golden.npz and golden.json into this folder."""
    arrays = {
        "ties_nf4": ties("nf4"),
        "ties_fp4": ties("fp4"),
        "kinds": blocks_of_all_kinds(),
        "extremes": extremes(),
        "zeros": np.zeros((3, 96), np.float32),
    }
    out = dict(arrays)
    out["table_nf4"] = bnb.get_4bit_type("nf4", device="cpu").numpy()
    out["table_fp4"] = bnb.get_4bit_type("fp4", device="cpu").numpy()
    out["table_nested"] = bnb.create_dynamic_map().numpy()
    table = cases()
    for case in table:
        fmt, block_size = case["fmt"], case["block_size"]
        if "array" in case:
            w = arrays[case["array"]]
            case["shape"] = list(w.shape)
            tag = case["array"]
        else:
            rng = np.random.default_rng(case["seed"])
            w = rng.standard_normal(case["shape"], dtype=np.float32)
            tag = "x".join(map(str, case["shape"]))
        w = torch.from_numpy(w).to(DTYPES[case["dtype"]])
        case["name"] = f"{fmt}-{case['dtype']}-{block_size}-{tag}"
        case["input_sha256"] = digest(w)
        stored = quantize(w, fmt, block_size)
        for key, value in stored.items():
            out[f"{case['name']}/{key}"] = value.numpy()
        scales = {"values": stored["absmax"], "nested_values": nested_scales(stored)}
        for key, absmax in scales.items():
            values = decode(stored, absmax, fmt, block_size, w.shape[1]).to(w.dtype)
            case[f"{key}_sha256"] = digest(values)
            if key == "values":
                case["kernel_agrees"] = kernel_agrees(stored, values, fmt, block_size)
    assert len({case["name"] for case in table}) == len(table)
    np.savez_compressed(FOLDER / "golden.npz", **out)
    head = {x.__name__: x.__version__ for x in (bitsandbytes, torch, np)}
    head |= {"quality": quality(), "cases": table}
    (FOLDER / "golden.json").write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
    main()
