"""Safetensors files are read lazily and equal what the `safetensors` package reads."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same_bits

import qlora_jax as ql
from qlora_jax.io import CheckpointError, open_safetensors, write_safetensors
from qlora_jax.io.formats.layouts import swap_nibbles
from qlora_jax.io.model_folder import older_config_keys, read_config_json
from qlora_jax.io.tensors import transposed

RNG = np.random.default_rng(0)
TENSORS = {
    "f32": RNG.normal(size=(5, 6, 7)).astype(np.float32),
    "f16": RNG.normal(size=(4, 3)).astype(np.float16),
    "bf16": RNG.normal(size=(4, 3)).astype(ml_dtypes.bfloat16),
    "f64": RNG.normal(size=(2,)),
    "f8": RNG.normal(size=(3, 3)).astype(ml_dtypes.float8_e4m3fn),
    "u8": RNG.integers(0, 256, (3, 5)).astype(np.uint8),
    "bool": np.array([True, False]),
    "i64": np.arange(4),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}


def test_reads_what_the_package_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(TENSORS, path, metadata={"format": "pt"})
    tensors = open_safetensors(path)
    assert tensors.metadata == {"format": "pt"} and tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert tensors[name].shape == expected.shape
        assert_same_bits(np.asarray(tensors[name]), expected)


def test_metadata_of_a_first_file_without_tensors_is_read(tmp_path):
    for name, tensors in {A: {}, B: TENSOR_B}.items():
        write_safetensors(tmp_path / name, tensors, metadata={"file": name})
    assert open_safetensors(tmp_path).metadata == {"file": A}


def test_the_package_reads_what_is_written(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    tensors = {**TENSORS}
    del tensors["f8"]  # which the package's NumPy reader does not know
    write_safetensors(path, tensors, metadata={"a": "b"})
    assert_same_bits(safetensors.numpy.load_file(path), tensors)
    assert os.listdir(path.parent) == ["x.safetensors"]


SLICES = [np.s_[1:3], np.s_[:, 2:5], np.s_[1:2, 1:3, 2:6], np.s_[...]]
SLICES += [np.s_[2:2], np.s_[:, :, -3:], np.s_[4:, :, :]]


@pytest.mark.parametrize("index", SLICES)
def test_slices(tmp_path, index):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    tensor = open_safetensors(tmp_path / "x.safetensors")["f32"]
    assert_same_bits(tensor[index], TENSORS["f32"][index])
    with pytest.raises(TypeError, match="must be indexed by slices"):
        tensor[0]
    with pytest.raises(ValueError, match="must have step 1"):
        tensor[::2]


@pytest.mark.parametrize(
    "index", [np.s_[3:1, :], np.s_[...], np.s_[1:], np.s_[-2:, 1:]]
)
def test_slices_of_a_transposed_matrix(index):
    x = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(transposed(x)[index], x.T[index])
    for index_with_step in (np.s_[::2, :], np.s_[:, ::-1]):
        with pytest.raises(ValueError, match="must have step 1"):
            transposed(x)[index_with_step]


@pytest.mark.parametrize("rows", [slice(2, 2), slice(3, 1), slice(9, None)])
def test_empty_slices_of_packed_codes(rows):
    codes = swap_nibbles(np.ones((4, 3), np.int32))
    assert codes[rows, :].shape == (0, 12)
    assert codes[rows, 5:2].shape == (0, 0)
    assert codes[rows, :].dtype == np.uint8


def test_negative_sizes_are_refused(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    tensor = open_safetensors(tmp_path / "x.safetensors")["f16"]
    with pytest.raises(ValueError, match="must keep its number of values"):
        tensor.reshape(-4, -3)


def folder_of(path, files, index=None):
    for name, tensors in files.items():
        write_safetensors(path / name, tensors)
    if index is not None:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (path / "model.safetensors.index.json").write_text(text)
    return path


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSOR_A, TENSOR_B = {"a": np.ones(2)}, {"b": np.zeros((1, 2))}


@pytest.mark.parametrize(
    "files, index, names",
    [
        ({A: TENSOR_A, B: TENSOR_B}, {"a": A, "b": B}, ["a", "b"]),
        ({A: TENSOR_A, B: TENSOR_B}, None, ["a", "b"]),
        ({"model.safetensors": TENSOR_A, "other.safetensors": TENSOR_B}, None, ["a"]),
        ({A: TENSOR_A, B: TENSOR_B}, {"a": A}, ["a"]),  # other files are not looked at
    ],
)
def test_folders(tmp_path, files, index, names):
    assert [*open_safetensors(folder_of(tmp_path, files, index))] == names


@pytest.mark.parametrize(
    "files, index, message",
    [
        ({A: TENSOR_A}, {"a": A, "b": B}, "must be a file"),
        (
            {A: TENSOR_A, B: TENSOR_B},
            {"a": A, "b": A},
            r"Missing from the files: \['b'\]",
        ),
        ({A: {**TENSOR_A, **TENSOR_B}}, {"a": A}, r"Missing from the index: \['b'\]"),
        ({A: TENSOR_A}, {"a": "../" + A}, "list plain file names"),
        ({A: TENSOR_A}, {"a": "/etc/x.safetensors"}, "list plain file names"),
        ({A: TENSOR_A}, {"a": "config.json"}, "must have a `weight_map`"),
        ({A: TENSOR_A}, [A], "must have a `weight_map`"),
        ({A: TENSOR_A, B: TENSOR_A}, None, r"duplicate tensors: \['a'\]"),
        ({}, None, "must hold .safetensors files"),
    ],
)
def test_wrong_folders_are_refused(tmp_path, files, index, message):
    tmp_path.joinpath("x").mkdir()
    folder = folder_of(tmp_path / "x", files, index)
    with pytest.raises(CheckpointError, match=message):
        open_safetensors(folder)


def test_links_stay_inside(tmp_path):
    outside = folder_of(tmp_path / "outside", {"model.safetensors": TENSOR_A})
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(CheckpointError, match="must be in its folder"):
        open_safetensors(folder)
    # The layout of the hub's cache: blobs next to snapshots.
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (outside / "model.safetensors").rename(blobs / "77")
    (snapshot / "model.safetensors").symlink_to("../../blobs/77")
    assert [*open_safetensors(snapshot)] == ["a"]
    linked = tmp_path / "link"
    linked.symlink_to(snapshot)
    assert [*open_safetensors(linked)] == ["a"]


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


BROKEN = {
    "no bytes": b"",
    "huge header": file_of({"a": entry()}, length=1 << 40),
    "not JSON": file_of(b"{a}"),
    "twice": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
    "NaN": file_of(b'{"a":NaN}'),
    "unknown dtype": file_of({"a": entry("F4")}),
    "overlap": file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "bytes left": file_of({"a": entry()}, b"\0" * 9),
    "truncated": file_of({"a": entry()}, b"\0" * 7),
}


def test_metadata_may_be_null(tmp_path):
    """mlx writes null if there is no metadata."""
    path = tmp_path / "adapters.safetensors"
    path.write_bytes(file_of({"__metadata__": None, "a": entry()}))
    tensors = open_safetensors(path)
    assert (tensors.metadata, [*tensors]) == ({}, ["a"])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    for source in (path, tmp_path):
        with pytest.raises(CheckpointError, match="model.safetensors"):
            open_safetensors(source)


def test_no_path(tmp_path):
    for path in (tmp_path / "nothing", "/dev/zero"):
        with pytest.raises(CheckpointError, match="must be a file or a folder"):
            open_safetensors(path)


def test_file_that_shrinks(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(1000)})
    tensor = open_safetensors(path)["a"]
    os.truncate(path, 500)
    with pytest.raises(CheckpointError, match="it ends inside a tensor"):
        np.asarray(tensor)


def test_nothing_is_left_half_written(tmp_path):
    class Fails:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            return np.ones(3, np.float32)

    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"a must have shape \(2,\)"):
        write_safetensors(path, {"a": Fails()})
    with pytest.raises(TypeError, match="a must have one of the dtypes"):
        write_safetensors(path, {"a": np.ones(2, complex)})
    with pytest.raises(ValueError, match="must not be called `__metadata__`"):
        write_safetensors(path, {"__metadata__": np.ones(2)})
    with pytest.raises(TypeError, match="`metadata` must map strings to strings"):
        write_safetensors(path, {"a": np.ones(2)}, metadata={"step": 1})
    with pytest.raises(TypeError, match="to strings. Got {1: 'step'}"):
        write_safetensors(path, {"a": np.ones(2)}, metadata={1: "step"})
    with pytest.raises(TypeError, match=r"names of tensors must be strings. Got \[3\]"):
        write_safetensors(path, {3: np.ones(2)})
    with pytest.raises(TypeError, match="seed must have one of the dtypes .* Got key<"):
        write_safetensors(path, {"seed": jax.random.key(0)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"vocab_size": 64, "vocab_size": 32}', "has duplicate keys: .'vocab_size'"),
        ('{"rms_norm_eps": NaN}', "must be strict JSON. Got NaN"),
        ('{"rope_theta": -1e999}', "must have finite numbers. Got -1e999"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_config_json_is_strict(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ql.io.CheckpointError, match=message):
        read_config_json(tmp_path)


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_type": None, "rope_theta": 5.0}, {"rope_theta": 5.0}),
        # transformers reads the key `type`, too.
        (
            {"type": "linear", "factor": 2.0},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_older_keys_of_rotary_embeddings(rope, expected):
    assert older_config_keys({"rope_parameters": rope}) == expected


def test_sections_of_rotary_embeddings_must_be_objects():
    for rope, key in [(["x"], "rope_parameters"), ({"full_attention": 1}, "full_att")]:
        config = {"model_type": "gemma3_text", "rope_parameters": rope}
        with pytest.raises(CheckpointError, match=f"`{key}.* must be a JSON object"):
            older_config_keys(config)
