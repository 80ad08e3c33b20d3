"""Packed weights against the libraries that read them: MLX, mlx-lm, transformers."""

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from helpers import assert_same_bits
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load

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
    """Returns the tensors of a file, and the weights that MLX decodes, in float32."""
    weight, scales, *biases = parts

    def widen(x):
        return x if x.dtype == mx.uint8 else x.astype(mx.float32)

    values = mx.dequantize(
        weight, widen(scales), *map(widen, biases), bits=4, **options
    )
    names = ("weight", "scales", "biases")[: len(parts)]
    tensors = {f"up.{name}": np.array(x) for name, x in zip(names, parts, strict=True)}
    return tensors, np.array(values.astype(mx.float32))


def test_awq_as_mlx_lm_reads_it():
    """Also in the layout that mlx-lm converts to, where zero points of 8 are exact."""
    codes = RNG.integers(-(1 << 31), 1 << 31, (K, N // 8)).astype(np.int32)
    awq = {
        "up.qweight": codes.view(np.uint32),
        "up.qzeros": np.full((K // 32, N // 8), 0x88888888, np.uint32),
        "up.scales": RNG.uniform(0.01, 0.1, (K // 32, N)).astype(np.float16),
    }
    awq_arrays, config = {k: mx.array(x) for k, x in awq.items()}, {"group_size": 32}
    mlx_arrays, _ = mlx_lm.utils._transform_awq_weights(awq_arrays, config)
    parts = [mlx_arrays[f"up.{x}"] for x in ("weight", "scales", "biases")]
    tensors, want = decode_with_mlx(parts, group_size=32, mode="affine")
    assert_same_bits(read_weights(tensors), want)
    signed = {k: x.view(np.int32) if x.itemsize == 4 else x for k, x in awq.items()}
    assert_same_bits(read_weights(signed), want)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "affine"])
def test_a_model_that_mlx_lm_packs_computes_the_same(mode, tmp_path):
    source = llama.save_float(tmp_path / "float")
    model, config = mlx_lm.utils.load_model(source)
    group_size = 16 if mode == "nvfp4" else 32
    model, config = mlx_lm.utils.quantize_model(model, config, group_size, 4, mode=mode)
    packed = tmp_path / "packed"
    mlx_lm.utils.save_model(packed, model)
    mlx_lm.utils.save_config(config, packed / "config.json")
    want = np.array(model(mx.array(llama.TOKENS)).astype(mx.float32))
    is_exact = mode != "affine"
    config, base = load(packed, jnp.float32, recode=not is_exact, progress=False)
    # MLX packs the head and the embedding too.
    head = base["lm_head"]["kernel"]
    assert head.fmt == mode if is_exact else head.dtype == "float32"
    assert base["embed_tokens"]["embedding"].dtype == "float32"
    assert_close(llama.our_logits(config, base), want)
