"""Kernels stay in their boxes (`nn.Partitioned`), which describe their sharding."""

import dataclasses

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    assert_same,
    fast_and_slow,
    make_mesh,
    randomized,
    trees_of,
)
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import boxed_by_path

PACKED = ql.QLoRAConfig(rank=4, block_size=16)
CONFIGS = {
    "packed": PACKED,
    "trained": ql.QLoRAConfig(rank=4, block_size=16, freeze_base=False),
    "float": ql.QLoRAConfig(rank=4, fmt=None),
}
normal = nn.initializers.normal()
named = nn.with_partitioning


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        up = nn.Dense(128, kernel_init=named(normal, (None, "a")), name="up")
        down = nn.with_logical_partitioning(normal, ("mlp", None))
        h = nn.tanh(up(x))
        return x + nn.Dense(64, kernel_init=down, use_bias=False, name="down")(h), None


class Model(nn.Module):
    """A stack of layers, and an attention kernel of three axes, boxed or not."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x = layers(name="layers")(x, None)[0]
        bias = named(normal, ("b", None))
        heads = named(normal, ("a", "b", None))
        x = nn.DenseGeneral((4, 16), kernel_init=heads, bias_init=bias, name="q")(x)
        return nn.DenseGeneral(64, axis=(-2, -1), name="out")(x)


x = jax.random.normal(jax.random.key(5), (8, 64))
PARAMS = jax.jit(Model().init)(jax.random.key(0), x)["params"]
SPECS = {  # of the float kernels
    "layers/up": (None, None, "a"),
    "layers/down": (None, "b", None),
    "q": ("a", "b", None),
    "out": (None, None, None),
}


def without_values(tree):
    """Returns the tree's structure, including boxes and their axis names."""
    return jax.tree.structure(jax.tree.map(lambda _: 0, tree))


def linen_init(params, config):
    return ql.linen.init(jax.random.key(1), Model(), params, config, x)


def kernels(tree):
    """Returns the boxed kernels by the path of their module."""
    flat = boxed_by_path(tree).items()
    return {path[:-7]: x for path, x in flat if path.endswith("/kernel")}


@pytest.mark.parametrize("name", fast_and_slow(["float"], ["packed", "trained"]))
def test_merge_gives_the_structure_of_the_parameters(name):
    base, lora = linen_init(PARAMS, CONFIGS[name])
    boxes = [type(k) for k in kernels(PARAMS).values()]
    assert {nn.Partitioned, nn.LogicallyPartitioned} < {*boxes}
    for path, leaf in kernels(base).items():
        box = kernels(PARAMS)[path]
        if isinstance(box, nn.Partitioned):
            assert (type(leaf), leaf.names) == (type(box), box.names)
    lora = randomized(lora)
    trees = [ql.merge(base, lora), ql.dequantize(base)]
    assert [without_values(tree) for tree in trees] == 2 * [without_values(PARAMS)]
    again = ql.split(ql.combine(base, lora))
    assert jax.tree.structure(again) == jax.tree.structure((base, lora))
    bare, _ = linen_init(nn.unbox(PARAMS), CONFIGS[name])
    assert str(ql.summary(base, lora)) == str(ql.summary(bare, lora))
    # The wrapped model's results are those of the model on merged weights.
    want = Model().apply({"params": trees[0]}, x)
    got, updates = ql.linen.wrap(Model(), scanned="layers").apply(
        {"params": base, "lora": lora}, x, mutable=["params"]
    )
    assert_close(got, want)
    assert jax.tree.structure(updates["params"]) == jax.tree.structure(base)


@pytest.mark.slow
def test_other_ways_to_pack_keep_boxes_too():
    base, _ = linen_init(PARAMS, PACKED)

    def init(params):
        return linen_init(params, PACKED)[0]

    contract = {"q/kernel": -3, "out/kernel": (-3, -2)}
    config = dataclasses.replace(PACKED, contract=contract)
    for tree in (
        jax.jit(init)(PARAMS),
        jax.eval_shape(init, PARAMS),
        ql.init(jax.random.key(1), PARAMS, config)[0],
        ql.quantize(PARAMS, config),
    ):
        assert jax.tree.structure(tree) == jax.tree.structure(base)


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_place_reads_them(mode):
    mesh = make_mesh(mode, axes=("a", "b"))
    base, lora = linen_init(PARAMS, PACKED)
    axes = {"mlp": "b"}

    def place(*trees):
        return ql.sharding.place(*trees, mesh, logical_axes=axes)

    placed, _ = place(base, lora)
    for path, leaf in kernels(placed).items():
        codes = nn.meta.unbox(leaf).codes
        geometry = nn.meta.unbox(leaf).geometry
        want = geometry.matrix_spec(SPECS[path], len(SPECS[path]))
        assert tuple(codes.sharding.spec) == tuple(want), path
    assert placed["q"]["bias"].value.sharding.spec == P("b", None)
    with jax.set_mesh(mesh):
        inside = jax.jit(place)(base, lora)[0]
    assert jax.tree.structure(inside) == jax.tree.structure(placed)

    def has_same_sharding(a, b):
        return a.sharding.is_equivalent_to(b.sharding, a.ndim)

    assert jax.tree.all(jax.tree.map(has_same_sharding, inside, placed))


def test_a_state_dict_comes_back():
    base, _ = linen_init(PARAMS, PACKED)
    data = flax.serialization.to_bytes(base)
    zeros = jax.tree.map(jnp.zeros_like, base)
    assert_same(flax.serialization.from_bytes(zeros, data), base)


def test_apply_opens_them():
    base, lora = trees_of(PARAMS["q"], rank=4, contract=-3)
    want = ql.apply(nn.unbox(base), lora, x)
    np.testing.assert_array_equal(ql.apply(base, lora, x), want)
    got = ql.apply(base["kernel"], lora["kernel"], x) + base["bias"].value[None]
    np.testing.assert_array_equal(got, want)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, kernel_init=named(normal, (None, "b")), name="up")(x)


class Layers(nnx.Module):
    """An nnx layer and a linen module, both with metadata."""

    def __init__(self, rngs):
        init = nnx.with_partitioning(normal, ("a", "b", None))
        self.q = nnx.LinearGeneral(64, (4, 16), kernel_init=init, rngs=rngs)
        self.linen = nnx.bridge.ToNNX(Linen(), rngs=rngs)
        self.linen.lazy_init(x)

    def __call__(self, x):
        return self.q(x).sum((-1, -2), keepdims=True)[..., 0] + self.linen(x)


@pytest.mark.slow
def test_nnx_keeps_metadata():
    mesh = make_mesh("Auto", axes=("a", "b"))
    with jax.set_mesh(mesh):
        model = Layers(nnx.Rngs(0))
        wrapped = ql.nnx.wrap(model, PACKED, x, rngs=nnx.Rngs(1))
        graphdef, state = nnx.split(wrapped)
        placed = ql.nnx.place(nnx.merge(graphdef, jax.jit(lambda s: s)(state)), mesh)
        kernels = placed.q.kernel, placed.linen.up["kernel"]
        specs = [k.get_value().codes.sharding.spec for k in kernels]
        assert specs == [P("a", "b"), P(None, "b")]
        merged = ql.nnx.merge(placed)
        assert_close(placed(x), merged(x))

    def flatten_params(model):
        return nnx.to_flat_state(nnx.state(model, nnx.Param))

    def metadata(model):
        return [(path, v.get_metadata()) for path, v in flatten_params(model)]

    assert metadata(merged) == metadata(model)
