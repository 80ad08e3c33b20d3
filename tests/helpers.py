"""A NumPy oracle of the stored format, a table of cases, and helpers for trees."""

import json
import os
import pathlib
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import assert_equal_but_for_rounding as assert_equal_but_for_rounding
from tolerances import relative_error as relative_error
from tolerances import rounding as rounding

import qlora_jax as ql

# Tests that draw random cases draw others with another seed.
SEED = int(os.environ.get("QLORA_JAX_SEED", "0"))


class Case(NamedTuple):
    """A kernel: its shape, format, block size, and whether its scales are packed."""

    shape: tuple
    fmt: str = "nf4"
    block_size: int = 64
    double_quant: bool = False


CASES = {
    "plain": Case((128, 24)),
    "double": Case((256, 40), double_quant=True),
    "fp4": Case((128, 24), "fp4"),
    "int4": Case((128, 24), "int4", double_quant=True),
    "int8": Case((128, 24), "int8"),
    "stack": Case((3, 128, 24), double_quant=True),
    "odd N": Case((96, 5), block_size=32, double_quant=True),
    "wide": Case((64, 1100), block_size=16, double_quant=True),  # 18 groups of scales
    "tall": Case((1152, 8), block_size=128),
    "block of 4096": Case((8192, 2), block_size=4096),
    "int4_f16": Case((128, 24), "int4_f16"),
    "q4_0": Case((2, 128, 24), "q4_0", 32),
    "mxfp4": Case((128, 24), "mxfp4", 32),
    "nvfp4": Case((2, 128, 24), "nvfp4", 16),
}

# These are the published tables, not imports from the library.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
E2M1_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLES = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.concatenate([FP4_MAGNITUDES, 0 - FP4_MAGNITUDES]),  # with no -0
    "int4": np.arange(-8, 8, dtype=np.float32),
    "int8": np.arange(-128, 128, dtype=np.float32),
    "int4_f16": np.arange(-8, 8, dtype=np.float32),
    "q4_0": np.arange(-8, 8, dtype=np.float32),
    "mxfp4": np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES]),
    "nvfp4": np.concatenate([E2M1_MAGNITUDES, -E2M1_MAGNITUDES]),
}
# Formats that allow any block size and double quantization.
ANY_BLOCK = ("nf4", "fp4", "int4", "int8")
# Formats of inference servers, and their block sizes.
SERVED = [("int4_f16", 32), ("int4_f16", 64), ("int4_f16", 128), ("q4_0", 32)]
SERVED += [("mxfp4", 32), ("nvfp4", 16)]
# bitsandbytes' signed dynamic map, which it computes in float32.
GOLDEN = pathlib.Path(__file__).parent / "data" / "bitsandbytes" / "golden.npz"
DYNAMIC_MAP = np.load(GOLDEN)["table_nested"]
# The magnitude that the largest weight of a block is mapped to.
_PEAKS = (1, 1, 7, 127, 7.5, 8, 4, 6)
PEAK = {name: np.float32(peak) for name, peak in zip(TABLES, _PEAKS, strict=True)}
# The widest half gap of each table, in units of the block's largest magnitude. A scale
# in float16 may be off by half an eps, and in e4m3 by a sixteenth; q4_0 has no 8.
HALF_GAP = {"nf4": 0.152, "fp4": 1 / 6, "int4": 0.5 / 7, "int8": 0.5 / 127}
HALF_GAP |= {"int4_f16": 0.504 / 7.5, "q4_0": 1.004 / 8, "mxfp4": 1 / 4, "nvfp4": 1 / 6}


def weights(case, seed=0, dtype=np.float32):
    """Draws the normal weights of a case."""
    return np.random.default_rng(seed).normal(size=case.shape).astype(dtype)


def unpack(codes, fmt, k):
    """Unpacks codes `[..., rows, N]` into table indices `[..., K, N]`."""
    if fmt == "int8":
        return codes
    rows = []
    for i in range(k):
        byte = codes[..., i // 2, :]
        rows.append(byte >> 4 if i % 2 == 0 else byte & 15)
    return np.stack(rows, axis=-2)


def scales_of(q):
    """A QTensor's scales `[..., blocks, N]` in float32, unpacked by NumPy."""
    codes = np.asarray(q.scales)
    if q.fmt == "mxfp4":
        return np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    if q.fmt == "nvfp4":
        factors = np.asarray(q.scale_scales)[..., None, None, :]
        return codes.astype(np.float32) * factors[..., 0] / factors[..., 1]
    if q.scale_scales is None:
        return codes.astype(np.float32)
    *batch, blocks, n = codes.shape
    flat = np.swapaxes(codes, -1, -2).reshape(*batch, n * blocks)
    group = np.arange(n * blocks) // 256
    nested = np.asarray(q.scale_scales)[..., group]
    flat = DYNAMIC_MAP[flat] * nested + np.asarray(q.scale_offset)[..., None]
    return np.swapaxes(flat.reshape(*batch, n, blocks), -1, -2)


def quantize(w, fmt, block_size):
    """Quantizes block by block, by definition: codes `[..., K, N]` and scales."""
    order = np.argsort(TABLES[fmt], kind="stable")
    ascending = TABLES[fmt][order]
    midpoints = (ascending[1:] + ascending[:-1]) / np.float32(2)
    codes, scales = [], []
    for start in range(0, w.shape[-2], block_size):
        block = w[..., start : start + block_size, :].astype(np.float32)
        scale = np.abs(block).max(-2) * (np.float32(1) / PEAK[fmt])
        up = block * (np.float32(1) / scale)[..., None, :]
        codes.append(order[np.searchsorted(midpoints, up, side="left")])
        scales.append(scale)
    return np.concatenate(codes, axis=-2), np.stack(scales, axis=-2)


def quantize_for_servers(w, fmt, block_size, largest_of_fused=None):
    """Quantizes `[K, N]` as each format's reference does: codes and decoded scales.

    The factor of nvfp4 is that of the largest weight, by default of `w`.
    """
    f32 = np.float32
    blocks = w.astype(f32).reshape(-1, block_size, w.shape[-1])
    largest = np.abs(blocks).max(1)
    if fmt == "q4_0":  # quantize_row_q4_0_ref in ggml-quants.c
        first = np.abs(blocks).argmax(1)[:, None]
        exact = np.take_along_axis(blocks, first, 1)[:, 0] / f32(-8)
        inverse = np.divide(f32(1), exact, out=np.zeros_like(exact), where=exact != 0)
        codes = (blocks * inverse[:, None] + f32(8.5)).astype(np.int8).clip(max=15)
        return codes.reshape(w.shape), exact.astype(np.float16).astype(f32)
    if fmt == "int4_f16":
        scales = (largest / f32(7.5)).astype(np.float16).astype(f32)
        scales[scales == 0] = 2.0**-10
        codes = np.clip(np.rint(blocks / scales[:, None]), -8, 7) + 8
        return codes.reshape(w.shape), scales
    if fmt == "mxfp4":
        mantissa, exponent = np.frexp(largest)  # from 0.5 up to 1
        scales = np.ldexp(f32(1), exponent - 3 + (mantissa >= 0.875))
        scales[largest == 0] = 2.0**-127
    else:
        global_scale = (f32(1) / (largest_of_fused or largest.max())) * f32(448 * 6)
        scales = (global_scale * (largest / f32(6))).astype(ml_dtypes.float8_e4m3fn)
        scales = np.where(scales == 0, f32(0.125), scales.astype(f32)) / global_scale
    x = blocks / scales[:, None]
    # Round to nearest, ties to even: an odd code excludes its lower midpoint.
    middle = (E2M1_MAGNITUDES[1:] + E2M1_MAGNITUDES[:-1]) / f32(2)
    least = np.where(np.arange(7) % 2, middle, np.nextafter(middle, f32(9)))
    codes = np.searchsorted(least, np.abs(x), side="right") + 8 * (x < 0)
    return codes.reshape(w.shape), scales


def check_compressed_tensors(name, w, arrays):
    """Checks that our bits are those of the package's compressor for weights [N, K]."""
    fmt, block_size = name.split()
    q = ql.quantize(jnp.asarray(w.T), fmt, block_size=int(block_size))
    codes = unpack(np.asarray(q.codes), fmt, q.shape[0]).T
    if fmt == "int4_f16":  # eight to a word, the first in the lowest bits
        words = codes.reshape(len(codes), -1, 8).astype(np.uint32)
        packed = (words << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1).astype("i4")
    else:
        packed = codes[:, ::2] | codes[:, 1::2] << 4
    scale = np.asarray(q.scales).T
    ours = {"packed": packed, "scale": scale, "values": np.asarray(q.dequantize()).T}
    if fmt == "nvfp4":
        ours |= {"scale": scale.view(np.uint8), "global_scale": q.scale_scales[1:]}
    assert_same_bits(ours, arrays)


def dequantize(q):
    """Dequantizes by definition: table value times scale in float32, rounded once."""
    *_, k, _ = q.matrix_shape
    index = unpack(np.asarray(q.codes), q.fmt, k)
    scales = np.repeat(scales_of(q), q.block_size, axis=-2)[..., :k, :]
    w = TABLES[q.fmt][index] * scales.astype(np.float32)
    return w.astype(q.dtype)


def ragged_product(x, w, sizes):
    """Multiplies rows by their experts in float64; rows without an expert get zeros."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, ends = np.zeros((len(x), w.shape[-1])), np.cumsum(sizes)
    for start, end, expert in zip(ends - sizes, ends, w, strict=True):
        y[start:end] = x[start:end] @ expert
    return y


def normal(seed, shape, dtype=jnp.float32, scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(values, dtype)


def randomized(tree, seed=2):
    """Replaces every leaf by small normal values, so that B of adapters is not zero."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [normal(seed + i, x.shape, x.dtype, 0.1) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, leaves)


def trees_of(params, **settings):
    """Returns the base tree and the lora tree of parameters, with B not zero."""
    base, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(**settings))
    return base, randomized(lora)


def biases(tree):
    """Returns the biases of a tree by path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in flat}
    return {path: leaf for path, leaf in named.items() if "'bias'" in path}


def put(tree, leaves):
    """Returns the tree with some leaves replaced, by path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf), tree
    )


def assert_same(got, want):
    """Asserts that trees have the same structure, shapes, dtypes and values."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_equal(got, want)


def assert_same_bits(got, want):
    """Asserts that trees are equal to the bit, including NaNs and signs of zeros."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)

    def has_same_bits(a, b):
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()

    chex.assert_trees_all_equal_comparator(
        has_same_bits, lambda a, b: f"{a}\n{b}", got, want
    )


def refusal(run, *words):
    """Returns the message of the ValueError of a call, which must match these words."""
    with pytest.raises(ValueError) as error:
        run()
    text = str(error.value)
    assert [word for word in words if word not in text] == []
    return text


def write_peft(folder, factors, extra_tensors=None, **settings):
    """Writes PEFT's files of an adapter, and returns its tensors.

    The tensors are A `[r, K]` and B `[N, r]` of each module, and `extra_tensors`, in
    which None removes a tensor.
    """
    pathlib.Path(folder).mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    tensors = {
        key: x for key, x in (tensors | (extra_tensors or {})).items() if x is not None
    }
    ql.io.write_safetensors(folder / "adapter_model.safetensors", tensors)
    return tensors


def make_mesh(*kinds, axes=("a", "b")):
    """Returns a 4 x 2 mesh; its axes are "Auto" or "Explicit", or one of each."""
    types = tuple(getattr(AxisType, kind) for kind in (kinds[0], kinds[-1]))
    return jax.make_mesh((4, 2), axes, axis_types=types)


def spread(tree, mesh, *spec):
    """Returns the arrays of a tree, each split over a mesh by this spec."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def fast_and_slow(fast, slow):
    """Returns cases for `pytest.mark.parametrize`, some of them marked slow."""
    return [*fast, *(_marked(case) for case in slow)]


def slow_but_every(step, cases):
    """Returns the cases for `parametrize`, all but every `step`th one marked slow."""
    return [_marked(c) if i % step else c for i, c in enumerate(cases)]


def _marked(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
