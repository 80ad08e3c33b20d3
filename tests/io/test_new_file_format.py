"""A toy file format, which only needs a record to be read and written like all others.

The first part of this file shows what a new file in qlora_jax/io/formats contains.
"""

import json

import jax
import numpy as np
import pytest
from helpers import assert_same_bits
from stored import tensors_of

import qlora_jax as ql
from qlora_jax.io.formats import registry
from qlora_jax.io.formats.file_format import FileFormat, Writer
from qlora_jax.io.formats.layouts import INT4_FORMATS, UINT8
from qlora_jax.io.stored_weight import packed_weight
from qlora_jax.io.tensors import LazyMatrix

# `toy_codes` [N, K] are integers from -8 to 7, one per byte. `toy_steps` [N, K / 32]
# are float16: weight = code * step.


def _read(parts, settings):
    stored = parts.tensor("toy_codes", "int8")
    steps = parts.tensor("toy_steps", "float16")

    def read_codes(rows, columns):
        codes = np.asarray(stored[rows, columns.start * 2 : columns.stop * 2]) + 8
        return (codes[:, ::2] << 4 | codes[:, 1::2]).astype(np.uint8)

    n, k = stored.shape
    codes = LazyMatrix(UINT8, (n, k // 2), read_codes)
    return {"weight": packed_weight("int4_f16", "float16", codes, steps)}


def _tensors(name, q):
    packed = np.asarray(q.codes)  # [K / 2, N]
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(q.matrix_shape)
    module = name.removesuffix("weight")
    parts = {
        "toy_codes": codes.T.astype(np.int8) - 8,
        "toy_steps": np.asarray(q.scales).T,
    }
    return {module + part: x for part, x in parts.items()}


def _config(kernels, float_modules, config):
    settings = {"quant_method": "toy", "bits": 4, "skip": float_modules}
    return {"quantization_config": settings}


TOY = FileFormat(
    marker=r"(.*\.|)toy_codes",
    parts=("toy_steps",),
    read=_read,
    methods={"toy": {"order": ("rows",)}},
    write=Writer("toy", INT4_FORMATS, _tensors, _config),
)

K, N = 64, 6
NAMES = ql.io.Names({"up/kernel": "up.weight", "norm/scale": "norm.weight"})
LIKE = {
    "up": {"kernel": jax.ShapeDtypeStruct((K, N), "float32")},
    "norm": {"scale": jax.ShapeDtypeStruct((K,), "float32")},
}
RNG = np.random.default_rng(0)
CODES = RNG.integers(-8, 8, (N, K)).astype(np.int8)
STEPS = RNG.uniform(0.001, 0.1, (N, K // 32)).astype(np.float16)
NORM = np.ones(K, np.float32)
TENSORS = {"up.toy_codes": CODES, "up.toy_steps": STEPS, "norm.weight": NORM}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "FILE_FORMATS", [*registry.FILE_FORMATS, TOY])


def write(folder, tensors=TENSORS, **settings):
    folder.mkdir()
    ql.io.write_safetensors(folder / "model.safetensors", tensors)
    config = {"quantization_config": {"quant_method": "toy", **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, **options):
    return ql.io.load(folder, NAMES, LIKE, progress=False, **options)


def test_weights_are_read(tmp_path):
    folder = write(tmp_path / "model")
    assert ql.io.read_quantization(folder)["fmt"] == "int4_f16"
    base = load(folder, dtype="float32")
    q = base["up"]["kernel"]
    assert (q.fmt, q.block_size) == ("int4_f16", 32)
    values = CODES.astype(np.float32) * np.repeat(STEPS.astype(np.float32), 32, axis=1)
    assert_same_bits(np.asarray(q.dequantize()), values.T)
    assert_same_bits(np.asarray(base["norm"]["scale"]), NORM)
    # A float copy has no settings of the format.
    ql.io.save_merged(tmp_path / "merged", folder, {}, NAMES, progress=False)
    assert_same_bits(tensors_of(tmp_path / "merged")["up.weight"], values.astype("f2"))
    assert ql.io.read_quantization(tmp_path / "merged") == {}


def test_weights_are_written(tmp_path):
    base = load(write(tmp_path / "model"))
    options = dict(layout="toy", progress=False)
    ql.io.save_packed(tmp_path / "again", base, NAMES, {}, **options)
    assert_same_bits(tensors_of(tmp_path / "again"), TENSORS)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    settings = {"quant_method": "toy", "bits": 4, "skip": ["lm_head"]}
    assert config == {"quantization_config": settings}
    again = load(tmp_path / "again")
    assert_same_bits(*map(jax.tree.leaves, (again, base)))
    base["up"]["kernel"] = ql.quantize(np.ones((K, N), np.float32), "nf4")
    with pytest.raises(ValueError, match="toy cannot store these kernels.*\n.*q4_0"):
        ql.io.save_packed(tmp_path / "other", base, NAMES, {}, **options)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"up.toy_steps": None}, {}, "up: `toy_steps` must be given"),
        ({"up.toy_steps": STEPS[:3]}, {}, "up: scales must be"),
        ({}, {"bits": 8}, "toy must have 4 bits. Got `bits` is 8"),
        ({}, {"order": "columns"}, "`order` of toy must be rows. Got 'columns'"),
    ],
)
def test_other_files_are_refused(changes, settings, message, tmp_path):
    tensors = {k: x for k, x in (TENSORS | changes).items() if x is not None}
    with pytest.raises(ql.io.CheckpointError, match=message):
        load(write(tmp_path / "model", tensors, **settings))
