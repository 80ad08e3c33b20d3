"""Our own format round-trips to the bit, and changed files are refused."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from qlora_jax.adapters.base import KINDS
from qlora_jax.io import CheckpointError, native, restore, save
from qlora_jax.quant.geometry import Geometry

CONFIG = ql.QLoRAConfig(
    rank=2,
    alpha=3.5,
    targets=["stack/kernel", re.compile(r"ODD/\d/kernel", re.IGNORECASE)],
    exclude=r".*nothing|norm",
    rank_pattern={"odd/0/.*": 3, ".*": 2},
    contract={"odd/0/kernel": "nk", "stack/kernel": (-2,)},
    lora_dtype=jnp.bfloat16,
)


def make(config=CONFIG):
    """Returns packed stacks, an odd N, a list of layers, bfloat16, and adapters."""
    rng = np.random.default_rng(0)

    def draw_normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "stack": {"kernel": draw_normal(2, 128, 24), "bias": draw_normal(2, 24)},
        "odd": [
            {"kernel": draw_normal(5, 64).astype(jnp.bfloat16)},
            {"scale": draw_normal(3)},
        ],
        "norm": draw_normal(24).astype(jnp.float16),
        "linear/~/w": draw_normal(),
        "step": jnp.int32(7),
    }
    base, lora = ql.init(jax.random.key(0), params, config)
    return {"base": base, "lora": lora}


TRAINED = {"trainable": ["norm", "linear.*"]}
TRAINED |= {"trainable_rows": {"odd/0/kernel": [4, 2]}}
CONFIGS = {
    "double": CONFIG,
    "plain": ql.QLoRAConfig(rank=2, fmt="fp4", double_quant=False, targets="stack/k.*"),
    "int8": ql.QLoRAConfig(
        rank=2, fmt="int8", block_size=32, targets="stack/kernel", **TRAINED
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name):
    config = CONFIGS[name]
    tree = make(config)
    save(tmp_path / "x", tree, config)
    restored = restore(tmp_path / "x")
    assert_same_bits(restored.tree, tree)

    def as_text(c):
        return (c.rank_pattern, c.contract, c.alpha, c.fmt, c.packing)

    assert as_text(restored.config) == as_text(config)
    assert restored.config.is_target("stack/kernel")
    assert restored.config.is_target("odd/0/kernel") == config.is_target("odd/0/kernel")
    save(tmp_path / "x", restored.tree, restored.config)  # in place of itself
    assert restore(tmp_path / "x").config == restored.config
    assert os.listdir(tmp_path) == ["x"]


def test_a_leaf_alone_and_no_config(tmp_path):
    q = ql.quantize(jnp.ones((64, 3)))
    save(tmp_path / "x", q)
    restored = restore(tmp_path / "x")
    assert_same_bits(restored.tree, q)
    assert restored.config is None
    # The header is a documented format, which other programs may read.
    with safetensors.safe_open(tmp_path / "x", "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("qlora_jax", "1")
    [leaf] = json.loads(metadata["leaves"])
    settings = dict(fmt="nf4", block_size=64, double_quant=True, dtype="float32")
    entry = dict(keys=[], kind="QTensor", shape=[64, 3], axes="kn")
    assert leaf == entry | settings


def test_each_device_gets_its_part(tmp_path):
    tree = {"up": {"kernel": ql.quantize(jnp.ones((128, 8)))}, "b": jnp.arange(8.0)}
    save(tmp_path / "x", tree)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    rules = {"up/kernel": P("fsdp", None), "b": P("fsdp")}

    def place(base):
        return ql.sharding.place(base, {}, mesh, rules)[0]

    restored = restore(tmp_path / "x", place=place).tree
    assert_same_bits(restored, place(tree))
    assert restored["b"].sharding == NamedSharding(mesh, P("fsdp"))


def test_place_must_return_all_leaves(tmp_path):
    x = np.ones((2, 4), np.float32)
    save(tmp_path / "x", {"a": x, "b": x})
    names = ql.io.Names({"a": "a.weight", "b": "b.weight"})
    tensors = {"a.weight": x, "b.weight": x}

    def place(tree):
        return {"a": tree["a"], "c": tree["b"]}

    for read in (
        lambda: restore(tmp_path / "x", place=place),
        lambda: ql.io.load(tensors, names, {"a": x, "b": x}, place=place),
    ):
        message = r"`place` must .* Missing: \['b'\]. Unexpected: \['c'\]"
        with pytest.raises(ValueError, match=message):
            read()
    struct = jax.ShapeDtypeStruct((2, 2), "float32")
    with pytest.raises(ValueError, match=r"b with shape \(2, 4\). Got \(2, 2\)"):
        restore(tmp_path / "x", place=lambda tree: {**tree, "b": struct})


def test_what_is_no_leaf_is_listed(tmp_path):
    tree = {
        "a": {"b": 1.0, "c": jnp.ones(2), "d": jax.random.key(0)},
        "e": ql.combine(*make().values()),
        "f": jax.tree_util.Partial(lambda x: x, jnp.ones(1)),
    }
    with pytest.raises(TypeError) as error:
        save(tmp_path / "x", tree)
    text = str(error.value)
    for part in [
        "a/b: it must be an array, a QTensor or an adapter. Got float",
        "a/d: it must hold numbers. Got PRNG keys",
        "e/stack/kernel: it must be an array, a QTensor or an adapter. Got Adapted",
        "f/",
    ]:
        assert part in text, text
    assert "a/c" not in text and os.listdir(tmp_path) == []


def test_trees_that_a_file_cannot_keep_are_refused(tmp_path):
    x = jnp.ones(2)
    tree = {"a": [{"b": []}, x], "c": {"d": (x, None)}, "__metadata__": x}
    with pytest.raises(TypeError) as error:
        save(tmp_path / "x", tree)
    for part in [
        "a/0: an item of a list must hold an array",
        "c/d/1: an item of a list must hold an array",
        "__metadata__: the format uses this name",
    ]:
        assert part in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("scaling", [np.float32(3), jnp.float32(3)])
def test_settings_may_be_numbers_of_numpy(scaling, tmp_path):
    a, b = jnp.ones((4, 1)), jnp.ones((1, 2))
    adapter = ql.LoRA(a, b, scaling, np.float32(0.5), Geometry())
    save(tmp_path / "x", {"up": adapter})
    restored = restore(tmp_path / "x").tree["up"]
    assert (restored.scaling, restored.dropout) == (3.0, 0.5)


def test_adapters_that_are_passed_as_the_config_are_refused(tmp_path):
    trees = make()
    with pytest.raises(TypeError, match="`config` must be a QLoRAConfig. Got dict"):
        save(tmp_path / "x", trees["base"], trees["lora"])
    assert not (tmp_path / "x").exists()


def test_load_names_the_function_that_reads_such_a_file(tmp_path):
    save(tmp_path / "x.safetensors", {"kernel": jnp.ones((4, 2))})
    like = {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
    with pytest.raises(CheckpointError, match="x.safetensors .*ql.io.restore"):
        ql.io.load(tmp_path / "x.safetensors", ql.io.Names({"kernel": "k"}), like)


def test_an_adapter_of_an_unregistered_kind_is_named(tmp_path, monkeypatch):
    save(tmp_path / "x", make()["lora"])
    monkeypatch.delitem(KINDS, "LoRA")
    with pytest.raises(CheckpointError, match="must be one of .* Got 'LoRA'"):
        restore(tmp_path / "x")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "x"
    save(path, make(), CONFIG)
    return path.read_bytes()


def refused(tmp_path, data, match):
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        restore(path)


def test_changed_and_truncated_files_are_refused(tmp_path, written):
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(written), 40):
        data = bytearray(written)
        data[position] ^= 1 << rng.integers(8)
        refused(tmp_path, data, "broken")
    for size in (0, 7, 100, len(written) // 2, len(written) - 1):
        refused(tmp_path, written[:size], "broken")
    refused(tmp_path, written + b"\0", "broken")


def test_other_formats_and_versions_are_refused(tmp_path, monkeypatch):
    ql.io.write_safetensors(
        tmp_path / "x", {"a": np.ones(2)}, metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="Its format is 'pt'"):
        restore(tmp_path / "x")
    monkeypatch.setattr(native, "VERSION", "2")
    save(tmp_path / "x", {"a": jnp.ones(2)})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="must have version 1. Got '2'"):
        restore(tmp_path / "x")
    save(tmp_path / "folder" / "model.safetensors", {"a": jnp.ones(2)})
    with pytest.raises(CheckpointError, match="must be a file. Got the folder"):
        restore(tmp_path / "folder")


CHANGES = [dict(kind="Other"), dict(kind=[]), dict(shape=[64, 4]), dict(shape="64")]
CHANGES += [dict(fmt="nf5"), dict(block_size=1 << 70), dict(axes="nn")]
CHANGES += [dict(dtype="int8"), dict(double_quant=False), dict(keys=["other"])]
CHANGES += [dict(keys=["a"] * 100_000), dict(keys=[0.5]), None]


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_wrong_descriptions_with_a_right_checksum(tmp_path, monkeypatch, change):
    describe = native.describe

    def describe_wrongly(keys, leaf):
        entry, arrays = describe(keys, leaf)
        return entry | change if change else {}, arrays

    monkeypatch.setattr(native, "describe", describe_wrongly)
    save(tmp_path / "x", {"a": ql.quantize(jnp.ones((64, 3)))})
    with pytest.raises(CheckpointError, match="must describe a tree of qlora_jax"):
        restore(tmp_path / "x")
