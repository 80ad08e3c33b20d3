"""AWQ's packed weights against mlx-lm, which reads them."""

import jax
import numpy as np
import pytest
from helpers import assert_same_bits

import qlora_jax as ql

mx = pytest.importorskip("mlx.core")
mlx_lm = pytest.importorskip("mlx_lm")
K, N = 128, 16
LIKE = {"up": {"kernel": jax.ShapeDtypeStruct((K, N), "float32")}}
NAMES = ql.io.Names({"up/kernel": "up.weight"})
RNG = np.random.default_rng(0)


def read_weights(tensors, **kwargs):
    """Returns the weights `[N, K]` that qlora_jax reads from tensors, in float32."""
    params = ql.io.load(tensors, NAMES, LIKE, dtype="float32", progress=False, **kwargs)
    return np.asarray(ql.dequantize(params["up"]["kernel"])).T


def decode_with_mlx(parts, **options):
    """Returns the weights that MLX decodes, in float32."""
    weight, scales, *biases = parts

    def widen(x):
        return x if x.dtype == mx.uint8 else x.astype(mx.float32)

    values = mx.dequantize(
        weight, widen(scales), *map(widen, biases), bits=4, **options
    )
    return np.array(values.astype(mx.float32))


def test_awq_as_mlx_lm_reads_it():
    codes = RNG.integers(-(1 << 31), 1 << 31, (K, N // 8)).astype(np.int32)
    awq = {
        "up.qweight": codes.view(np.uint32),
        "up.qzeros": np.full((K // 32, N // 8), 0x88888888, np.uint32),
        "up.scales": RNG.uniform(0.01, 0.1, (K // 32, N)).astype(np.float16),
    }
    awq_arrays, config = {k: mx.array(x) for k, x in awq.items()}, {"group_size": 32}
    mlx_arrays, _ = mlx_lm.utils._transform_awq_weights(awq_arrays, config)
    parts = [mlx_arrays[f"up.{x}"] for x in ("weight", "scales", "biases")]
    want = decode_with_mlx(parts, group_size=32, mode="affine")
    signed = {k: x.view(np.int32) if x.itemsize == 4 else x for k, x in awq.items()}
    assert_same_bits(read_weights(signed), want)
