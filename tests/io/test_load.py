"""Reading and packing a checkpoint piece by piece equals packing the whole tree."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_same_bits, fast_and_slow
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from qlora_jax.io import CheckpointError, Entry, Names, device_shards

L, D, F, H, V = 3, 128, 256, 4, 40
NAMES = Names(
    {
        "embed/embedding": "embed.weight",
        "layers/norm/scale": "layers.{layer}.norm.weight",
        "layers/up/kernel": "layers.{layer}.up.weight",
        "layers/q/kernel": Entry("layers.{layer}.q.weight", "knn"),
        "layers/q/bias": Entry("layers.{layer}.q.bias", "nn"),
        "layers/kv/w": Entry(
            ("layers.{layer}.k.weight", "layers.{layer}.v.weight"), "bnkn"
        ),
        "layers/out/w": Entry("layers.{layer}.out.weight", "nkk"),
        "head_{head}/kernel": "heads.{head}.weight",
    },
    ignored=(r".*\.inv_freq",),
)
SHAPES = {
    "embed": {"embedding": (V, D)},
    "layers": {
        "norm": {"scale": (L, D)},
        "up": {"kernel": (L, D, F)},
        "q": {"kernel": (L, D, H, D // H), "bias": (L, H, D // H)},
        "kv": {"w": (L, 2, 2, D, D // H)},
        "out": {"w": (L, D, H, D // H)},
    },
    "head_0": {"kernel": (D, 6)},
    "head_1": {"kernel": (D, 6)},
}


def make(dtype=np.float32, seed=0):
    """Returns a checkpoint and its tree, whose axes NumPy arranges one by one."""
    rng = np.random.default_rng(seed)

    def draw_normal(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(dtype)

    tensors = {"embed.weight": draw_normal(V, D), "rotary.inv_freq": draw_normal(4)}
    kernels = {"up": (F, D), "q": (D, D), "out": (D, D)}
    kernels |= {"k": (2 * D // H, D), "v": (2 * D // H, D)}
    for i in range(L):
        tensors |= {
            f"layers.{i}.norm.weight": draw_normal(D),
            f"layers.{i}.q.bias": draw_normal(D),
        }
        tensors |= {
            f"layers.{i}.{x}.weight": draw_normal(*s) for x, s in kernels.items()
        }
    tensors |= {f"heads.{i}.weight": draw_normal(6, D) for i in range(2)}

    def stack(name):
        return np.stack([tensors[f"layers.{i}.{name}"] for i in range(L)])

    kv = np.stack([stack("k.weight"), stack("v.weight")], axis=1)
    kv = kv.reshape(L, 2, 2, D // H, D).swapaxes(-1, -2)
    q = stack("q.weight").swapaxes(1, 2).reshape(L, D, H, D // H)
    layers = {
        "norm": {"scale": stack("norm.weight")},
        "up": {"kernel": stack("up.weight").swapaxes(1, 2)},
        "q": {"kernel": q, "bias": stack("q.bias").reshape(L, H, D // H)},
        "kv": {"w": kv},
        "out": {"w": stack("out.weight").reshape(L, D, H, D // H)},
    }
    params = {"embed": {"embedding": tensors["embed.weight"]}, "layers": layers}
    params |= {f"head_{i}": {"kernel": tensors[f"heads.{i}.weight"].T} for i in (0, 1)}
    return tensors, params


def write(folder, dtype=np.float32):
    """Writes the checkpoint, and returns its tree."""
    tensors, params = make(dtype)
    ql.io.write_safetensors(folder / "model.safetensors", tensors)
    return params


load = functools.partial(ql.io.load, progress=False)


def like():
    def shape_struct(s):
        return jax.ShapeDtypeStruct(s, jnp.float32)

    return jax.tree.map(shape_struct, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def packed(params, **settings):
    """Returns a config, and the whole tree packed at once."""
    contract = {"layers/up/kernel": "kn", "layers/q/kernel": "knn"}
    contract |= {"layers/kv/w": "bnkn", "layers/out/w": "nkk"}
    settings |= dict(targets=r"layers/.*(kernel|w)", contract=contract, rank=4)
    config = ql.QLoRAConfig(**settings)
    return config, ql.quantize(params, config)


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(device_shards, "PIECE", 9000)


@pytest.mark.parametrize("dtype", fast_and_slow([ml_dtypes.bfloat16], [np.float16]))
def test_float_tree(tmp_path, dtype, in_pieces):
    params = write(tmp_path, dtype)
    assert_same_bits(load(tmp_path, NAMES, like()), params)
    loaded = load(tmp_path, NAMES, like(), dtype=jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    assert_same_bits(loaded, wide)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, settings",
    [
        (np.float32, {}),
        (ml_dtypes.bfloat16, {"double_quant": False, "fmt": "fp4"}),
        (np.float16, {"double_quant": False, "fmt": "int8", "block_size": 128}),
    ],
)
def test_packed_tree_equals_one_that_is_packed_whole(
    tmp_path, dtype, settings, in_pieces
):
    config, expected = packed(write(tmp_path, dtype), **settings)
    loaded = load(tmp_path, NAMES, like(), config)
    assert_same_bits(loaded, expected)
    # Loaded arrays are uncommitted, so they may be used on any device.
    assert not any(x.committed for x in jax.tree.leaves(loaded))


RULES = {
    "layers/up/kernel": P(None, "fsdp", "tensor"),
    "layers/q/kernel": P(None, "fsdp", "tensor", None),
    "layers/q/bias": P(None, "tensor"),
    "layers/kv/w": P(None, None, "tensor", "fsdp", None),
    "layers/out/w": P(None, "fsdp", "tensor", None),
    "embed/embedding": P("tensor", "fsdp"),
    r"head_\d/kernel": P("fsdp", "tensor"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, is_packed, memory",
    [
        ("Auto", True, "device"),
        ("Auto", True, "host"),
        ("Explicit", True, "device"),
        ("Auto", False, "device"),
        ("Explicit", False, "device"),
    ],
)
def test_each_device_gets_its_part(tmp_path, kind, is_packed, memory, in_pieces):
    params = write(tmp_path)
    config, expected = packed(params)
    kinds = (AxisType[kind],) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=kinds)

    def place(base):
        return ql.sharding.place(base, {}, mesh, RULES, memory=memory)[0]

    config, expected = (config, expected) if is_packed else (None, params)
    loaded = load(tmp_path, NAMES, like(), config, place=place)
    placed = place(expected)
    assert_same_bits(loaded, placed)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(placed), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.slow
def test_last_axes_of_float_kernels_may_be_split():
    tensors, params = make()
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        (L, D, H, D // H): P(None, "a", None, "b"),
        (L, 2, 2, D, D // H): P(None, "a", None, None, "b"),
        (L, D, F): P(None, ("b", "a")),
    }

    def put(x):
        sharding = NamedSharding(mesh, specs.get(x.shape, P()))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place(tree):
        return jax.tree.map(put, tree)

    assert_same_bits(load(tensors, NAMES, like(), place=place), params)


@pytest.mark.slow
def test_one_other_device():
    tensors, params = make()
    sharding = SingleDeviceSharding(jax.devices()[3])

    def put(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place(tree):
        return jax.tree.map(put, tree)

    config, expected = packed(params)
    loaded = load(tensors, NAMES, like(), config, place=place)
    assert_same_bits(loaded, expected)
    assert {x.sharding for x in jax.tree.leaves(loaded)} == {sharding}


def test_all_wrong_tensors_are_listed():
    tensors, _ = make()
    del tensors["layers.1.norm.weight"]
    tensors["layers.0.up.weight"] = tensors["layers.0.up.weight"].T
    tensors["layers.2.q.bias"] = tensors["layers.2.q.bias"].astype(np.int32)
    fp8 = tensors["layers.0.q.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors["layers.0.q.weight"] = fp8
    tensors["other.weight"] = np.ones(2)
    shapes = {**like(), "more": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}
    with pytest.raises(CheckpointError) as error:
        load(tensors, NAMES, shapes)
    text = str(error.value)
    for line in [
        "missing: layers.1.norm.weight",
        "unexpected: other.weight",
        "mis-shaped: layers.0.up.weight (must be (256, 128), is (128, 256))\n",
        "float64: layers.0.q.weight (float8_e4m3fn), layers.2.q.bias (int32)\n",
        "no name: more/kernel",
    ]:
        assert line in text, text


def load_single_weight(value, index=(1, 5), **settings):
    """Loads a kernel of ones with this value at `index`."""
    w = np.ones((2, 64), np.float32)
    w[index] = value
    shapes = {"kernel": jax.ShapeDtypeStruct((64, 2), jnp.float32)}
    config = ql.QLoRAConfig(**settings) if settings else None
    return load({"w": w}, Names({"kernel": "w"}), shapes, config)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("settings", [{}, {"fmt": "nf4"}], ids=["float", "packed"])
def test_nan_is_refused_by_name(value, settings):
    with pytest.raises(CheckpointError, match="w must be finite"):
        load_single_weight(value, **settings)


def test_weights_that_decode_to_infinity_are_refused_by_name():
    """Weights that decode to finite numbers are packed."""
    settings = {"fmt": "mxfp4", "block_size": None, "double_quant": None}
    assert load_single_weight(2e38, **settings)["kernel"].fmt == "mxfp4"
    with pytest.raises(CheckpointError, match="w must be .* small enough for mxfp4"):
        load_single_weight(3.3e38, **settings)


def test_overflow_of_scales_is_refused():
    assert (
        load_single_weight(3e38, fmt="nf4", double_quant=False)["kernel"].fmt == "nf4"
    )
    with pytest.raises(CheckpointError, match="kernel must be smaller"):
        load_single_weight(3e38, ..., fmt="nf4")


def test_targets_that_are_no_kernels_are_refused():
    tensors, _ = make()
    config = ql.QLoRAConfig(targets="embed/embedding")
    with pytest.raises(ValueError, match="says that it is not a kernel"):
        load(tensors, NAMES, like(), config)


def test_mixed_dtypes_are_refused():
    tensors, _ = make()
    tensors["layers.1.up.weight"] = tensors["layers.1.up.weight"].astype(np.float16)
    with pytest.raises(CheckpointError, match="layers/up/kernel: its tensors are of"):
        load(tensors, NAMES, like())


@pytest.mark.parametrize("roles", ["kn", "nk"])
def test_one_tensor_has_the_kernels_of_all_experts(tmp_path, roles):
    entry = Entry("experts.up.{expert}", stack_roles=roles)
    names = Names({"up/kernel": entry})
    kernel = np.random.default_rng(0).normal(size=(3, 8, 6)).astype(np.float32)
    stored = kernel if roles == "kn" else kernel.swapaxes(1, 2)
    like = {"up": {"kernel": jax.ShapeDtypeStruct(kernel.shape, jnp.float32)}}
    tree = ql.io.load({"experts.up": stored}, names, like, progress=False)
    np.testing.assert_array_equal(tree["up"]["kernel"], kernel)
    config = {"model_type": "x"}
    ql.io.save_merged(tmp_path, tree, {}, names, config, progress=False)
    written = ql.io.open_safetensors(tmp_path)
    assert [*written] == ["experts.up"]
    np.testing.assert_array_equal(written["experts.up"][...], stored)


@pytest.mark.parametrize("dtype", ["int8", bool, jnp.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    tensors, names = {"up": np.ones((2, 3), np.float32)}, Names({"up": "up"})
    like = {"up": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(TypeError, match="`dtype` must be a floating dtype"):
        ql.io.load(tensors, names, like, dtype=dtype, progress=False)


def test_experts_that_are_also_stored_alone_are_refused():
    entry, stack = Entry("experts.up.{expert}", "kn"), np.ones((2, 4, 3), np.float32)
    like = {"up": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)}
    alone = np.zeros((3, 4), np.float32)
    tensors = {"experts.up": stack, "experts.up.1": alone}
    for source in (tensors, dict(reversed(tensors.items()))):
        with pytest.raises(CheckpointError, match="in a stack: experts.up.1$"):
            ql.io.load(source, Names({"up": entry}), like, progress=False)
