"""Checkpoints of compressed-tensors are read as they are; tests/data has its bits."""

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax import cli

GOLDEN = np.load(helpers.GOLDEN.parents[1] / "compressed_tensors" / "golden.npz")
SCHEMES = sorted({key.rpartition(" ")[0] for key in GOLDEN} - {""})
NAMES = ql.io.Names({"up/kernel": "up.weight"})
LIKE = {"up": {"kernel": jax.ShapeDtypeStruct((256, 8), jnp.float32)}}


def stored(name, **changes):
    """The tensors of a checkpoint; a change to None leaves one out."""
    parts = {"packed": GOLDEN[f"{name} packed"], "scale": GOLDEN[f"{name} scale"]}
    if name.startswith("int4"):
        parts["shape"] = np.array([8, 256])
    if name.startswith("nvfp4"):
        parts["scale"] = parts["scale"].view(ml_dtypes.float8_e4m3fn)
        parts["global_scale"] = GOLDEN[f"{name} global_scale"]
    parts |= changes
    return {f"up.weight_{part}": x for part, x in parts.items() if x is not None}


def load(tensors, *args, **kwargs):
    found = ql.io.load(tensors, NAMES, LIKE, *args, progress=False, **kwargs)
    return found["up"]["kernel"]


@pytest.mark.parametrize("name", SCHEMES)
def test_the_bits_are_those_of_the_file(name, tmp_path):
    path = tmp_path / "model.safetensors"
    ql.io.write_safetensors(path, stored(name))
    q = load(path)
    (leaf,) = cli.inspect(cli.InspectConfig(str(path))).leaves
    assert (leaf.name, leaf.format) == ("up.weight", f"{name.replace(' ', ' block ')}")
    assert leaf.bytes == sum(x.nbytes for x in stored(name).values())
    fmt, block_size = name.split()
    w = jnp.asarray(GOLDEN["weights"].T)
    ours = ql.quantize(w, fmt, block_size=int(block_size))
    helpers.assert_same_bits(jax.tree.leaves(q), jax.tree.leaves(ours))
    assert q.dtype == ("float16" if fmt == "int4_f16" else "bfloat16")
    wide = load(path, dtype=jnp.float32).dequantize()
    helpers.assert_same_bits(np.asarray(wide), GOLDEN[f"{name} values"].T)
    values = GOLDEN[f"{name} values"].T.astype(q.dtype)
    helpers.assert_same_bits(np.asarray(q.dequantize()), values)
    # And written again.
    base, again = {"up": {"kernel": q}}, tmp_path / "again"
    ql.io.save_packed(again, base, NAMES, {}, "compressed-tensors", progress=False)
    written = {key: x[...] for key, x in ql.io.open_safetensors(again).items()}
    helpers.assert_same_bits(written, stored(name))
    # Packed again in other settings, from these weights.
    settings = dict(block_size=32, double_quant=False)
    config = ql.QLoRAConfig(fmt="int4", **settings)
    with pytest.raises(ValueError, match="recode=True packs it again"):
        load(path, config)
    again = ql.quantize(jnp.asarray(values), "int4", **settings)
    helpers.assert_same_bits(load(path, config, recode=True), again)


def test_scales_of_a_bfloat16_model_are_read_where_float16_holds_them():
    scale = GOLDEN["int4_f16 64 scale"].astype(ml_dtypes.bfloat16)
    q = load(stored("int4_f16 64", scale=scale))
    assert q.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(q.scales), scale.T.astype(np.float16))
    scale[0, 0] = 1e-20
    with pytest.raises(ql.io.CheckpointError, match="must hold finite float16 numbers"):
        load(stored("int4_f16 64", scale=scale))


F16 = np.float16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("int4_f16 32", {"zero_point": np.zeros((1, 8), "i4")}, "zero points other"),
        ("int4_f16 32", {"zero_point": np.zeros((2, 8), "i4")}, r"must be \[1, 8\]"),
        ("int4_f16 32", {"g_idx": np.zeros(256, "i4")}, "act order"),
        (
            "int4_f16 32",
            {"g_idx": np.zeros(9, "i4")},
            "must be 256 numbers from 0 to 7",
        ),
        ("mxfp4 32", {"g_idx": np.zeros(256, "i4")}, "`weight_g_idx` must be left out"),
        ("int4_f16 32", {"scale": None}, "`weight_scale` must be given"),
        ("int4_f16 32", {"scale": np.ones((8, 3), F16)}, "K being 256"),
        ("int4_f16 32", {"scale": np.ones((4, 8), F16)}, "K being 256"),
        ("int4_f16 32", {"scale": np.ones((8, 16), F16)}, "must be 32 or 64 or 128"),
        ("int4_f16 32", {"scale": np.full((8, 8), np.nan, F16)}, "finite float16"),
        ("int4_f16 32", {"shape": np.array([8, 128])}, "for 4 bits"),
        ("int4_f16 32", {"shape": None}, "for 4 bits. Got None"),
        ("int4_f16 32", {"packed": np.ones((8, 128), np.uint8)}, "must be of"),
        ("int4_f16 32", {"global_scale": np.ones(1, "f4")}, "must be left out"),
        ("mxfp4 32", {"scale": np.full((8, 8), 255, np.uint8)}, "finite uint8"),
        ("nvfp4 16", {"global_scale": None}, "must be one number"),
        ("nvfp4 16", {"global_scale": np.zeros(1, "f4")}, "must be positive"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(name, changes, message):
    with pytest.raises(ql.io.CheckpointError, match=message):
        load(stored(name, **changes))
