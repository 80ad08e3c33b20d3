"""Merge-aware adapters: what is trained is what `merge` packs, in every format."""

import dataclasses
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    TABLES,
    assert_same,
    make_mesh,
    normal,
    quantize,
    quantize_for_servers,
    relative_error,
    rounding,
)
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from qlora_jax.adapters import merge_aware
from qlora_jax.quant.formats import FORMATS, Packing
from qlora_jax.quant.pack import quantize_checked

K, N, RANK = 128, 72, 4


def make(shape=(K, N), seed=0, **options):
    """A base and its adapter, as if it had been trained."""
    settings = {"rank": RANK, "alpha": 8, "merge_aware": True, "double_quant": False}
    config = ql.QLoRAConfig(**settings | options)
    key = jax.random.key(seed)
    base, lora = ql.init(key, {"kernel": normal(seed, shape)}, config)
    trained_b = normal(seed + 1, lora["kernel"].b.shape, scale=0.1)
    return base, {"kernel": dataclasses.replace(lora["kernel"], b=trained_b)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Packs 15 columns of K rows at a time, which does not divide N."""
    monkeypatch.setattr(merge_aware, "TILE_BYTES", 4 * K * 16 - 1)


def pack_and_decode(w, packing):
    """Decodes the weights that a format's reference packs, computed by NumPy."""
    pack = quantize_for_servers if packing.format.block_sizes else quantize
    codes, scales = pack(w, packing.fmt, packing.block_size)
    codes = codes.astype(np.uint8)
    return TABLES[packing.fmt][codes] * np.repeat(scales, packing.block_size, axis=0)


@pytest.mark.parametrize("fmt", [None, "nf4", "int8"])
@pytest.mark.parametrize("target_fmt", FORMATS)
def test_the_product_is_that_of_the_packed_sum(fmt, target_fmt, small_tiles):
    base, lora = make(fmt=fmt, target_fmt=target_fmt)
    packing = Packing(target_fmt, double_quant=False)  # the default may be True
    lora["kernel"] = dataclasses.replace(lora["kernel"], packing=packing)
    adapter, x, g = lora["kernel"], normal(2, (5, K)), normal(3, (5, N))
    w = np.asarray(ql.dequantize(base)["kernel"], np.float32)
    a, b = np.asarray(adapter.a), np.asarray(adapter.b)
    merged = w + np.float32(adapter.scaling) * (a @ b)
    want = pack_and_decode(merged, adapter.packing)

    def loss(lora, x):
        y = ql.apply(base, lora, x)
        return jnp.vdot(y, g), y

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (grads, dx), y = run(lora, x)
    bound = rounding(2 * K + RANK)
    assert relative_error(y, np.float64(x) @ want) < bound
    assert relative_error(ql.merge(base, lora)["kernel"], want) < bound
    # The gradient of x is that of the packed weights; those of A and B are LoRA's.
    x, g, s = np.float64(x), np.float64(g), adapter.scaling
    assert relative_error(dx, g @ want.T) < bound
    assert relative_error(grads["kernel"].a, s * x.T @ (g @ b.T)) < bound
    assert relative_error(grads["kernel"].b, s * (x @ a).T @ g) < bound


@pytest.mark.parametrize(
    "shape, options",
    [
        ((K, N), {"double_quant": True}),
        ((3, K, N), {"contract": "bkn"}),
        ((N, K), {"contract": -1}),
        ((K, 2, N // 2), {"contract": -3, "target_fmt": "nvfp4"}),
    ],
)
def test_the_bytes_of_the_file_are_those_of_packing_the_sum(
    shape, options, small_tiles
):
    base, lora = make(shape, **options)
    adapter = lora["kernel"]
    settings = adapter.a, adapter.b, adapter.scaling, 0.0, adapter.geometry
    merged = ql.merge(base, {"kernel": ql.LoRA(*settings)})["kernel"]
    want = quantize_checked(merged, adapter.packing, adapter.geometry)
    packed = ql.merge(base, lora, requantize=True)
    assert_same(packed["kernel"], want)
    x = normal(2, (*shape[: len(shape) - 2], 5, K) if "b" in str(options) else (5, K))
    bound = rounding(2 * K)
    assert relative_error(ql.apply(base, lora, x), ql.apply(packed, None, x)) < bound


def test_training_it_beats_packing_an_ordinary_adapter():
    # The target differs from the base by less than half a step of the grid in most
    # weights, so packing the merged weights of an ordinary adapter loses much of it.
    params, x = {"kernel": normal(0, (K, N))}, normal(1, (256, K))
    change = normal(2, (K, 2)) @ normal(3, (2, N))
    target = x @ (params["kernel"] + 0.02 * change)
    losses = {}
    for name, options in {"ordinary": {}, "merge-aware": {"merge_aware": True}}.items():
        config = ql.QLoRAConfig(rank=RANK, **options)
        base, lora = ql.init(jax.random.key(0), params, config)
        optimizer = optax.adam(optax.cosine_decay_schedule(0.01, 300))

        def loss(lora, base=base):
            return jnp.mean((ql.apply(base, lora, x) - target) ** 2)

        @jax.jit
        def step(lora, state, loss=loss, optimizer=optimizer):
            grads = jax.grad(loss)(lora)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(lora, updates), state

        state = optimizer.init(lora)
        for _ in range(300):
            lora, state = step(lora, state)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "requantizing moved", UserWarning)
            packed = ql.merge(base, lora, requantize=True)
        losses[name] = float(jnp.mean((ql.apply(packed, None, x) - target) ** 2))
        if options:
            np.testing.assert_allclose(losses[name], loss(lora), rtol=1e-4)
    assert losses["merge-aware"] < 0.9 * losses["ordinary"], losses


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "spec", [P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, ("fsdp", "tensor"))]
)
@pytest.mark.parametrize("target_fmt", ["nf4", "nvfp4"])
def test_a_mesh_changes_nothing(kind, spec, target_fmt):
    options = {"target_fmt": target_fmt, "double_quant": True}
    base, lora = make((256, 96), **options)
    x, g = normal(2, (8, 256)), normal(3, (8, 96))

    def loss(lora, base, x):
        return jnp.sum(ql.apply(base, lora, x) * g)

    want_y, want_grads = ql.apply(base, lora, x), jax.grad(loss)(lora, base, x)
    mesh = make_mesh(kind, axes=("fsdp", "tensor"))
    base, lora = ql.sharding.place(base, lora, mesh, {"kernel": spec})
    with jax.set_mesh(mesh):
        y = jax.jit(ql.apply)(base, lora, x)
        grads = jax.jit(jax.grad(loss))(lora, base, x)
    assert relative_error(y, want_y) < rounding(512)
    for name, want in want_grads["kernel"].arrays.items():
        got = grads["kernel"].arrays[name]
        assert relative_error(got, want) < rounding(512)


def test_devices_pack_their_own_columns():
    base, lora = make((256, 96), double_quant=True)
    mesh = make_mesh("Auto", axes=("fsdp", "tensor"))
    rules = {"kernel": P("fsdp", "tensor")}
    base, lora = ql.sharding.place(base, lora, mesh, rules)
    with jax.set_mesh(mesh):
        compiled = jax.jit(ql.apply).lower(base, lora, normal(2, (8, 256))).compile()
    text = compiled.as_text()
    # Gathered are A and B, of 4 columns and rows, and packed weights, never floats.
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text):
        if "f32" in shape:
            assert min(map(int, shape.split(","))) <= RANK
    assert "all-to-all" not in text


def test_stacks_are_scanned_and_experts_are_ragged():
    base, lora = make((3, K, K), contract="bkn", double_quant=True)
    x = normal(2, (5, K))
    packed = ql.merge(base, lora, requantize=True)

    def run(base, lora):
        def layer(x, trees):
            return jnp.tanh(ql.apply(*trees, x)), None

        return jax.lax.scan(layer, x, (base, lora))[0]

    scanned = dataclasses.replace(lora["kernel"])
    assert scanned.label == "merge-aware"
    unstacked = make((3, K, K), double_quant=True)
    want = x
    for i in range(3):
        layer_of = lambda tree, i=i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
        want = jnp.tanh(ql.apply(*map(layer_of, unstacked), want))
    got = jax.jit(run)(*unstacked)
    assert relative_error(got, want) < rounding(8 * K)
    sizes = jnp.array([2, 0, 3])
    experts = base["kernel"], x, sizes, lora["kernel"]
    y = ql.ragged_dot(experts[1], experts[0], sizes, experts[3])
    want = ql.ragged_dot(x, packed["kernel"], sizes)
    assert relative_error(y, want) < rounding(2 * K)


def test_flax_modules_compute_with_it():
    base, lora = make()
    x = normal(2, (5, K))
    want = ql.apply(base, lora, x)
    model = ql.linen.wrap(nn.Dense(N, use_bias=False))
    y = model.apply({"params": base, "lora": lora}, x)
    np.testing.assert_array_equal(y, want)
    layer = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    wrapped = ql.nnx.wrap(layer, ql.QLoRAConfig(rank=1), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(ql.nnx.join(wrapped, base, lora)(x), want)


def test_only_packed_weights_and_factors_are_kept(monkeypatch):
    k = n = 1024
    monkeypatch.setattr(merge_aware, "TILE_BYTES", 4 * k * 32)
    base, lora = make((4, k, n), double_quant=True)
    ordinary = lora["kernel"]
    settings = ordinary.a, ordinary.b, ordinary.scaling, 0.0, ordinary.geometry
    x = normal(2, (512, k))

    def compile_gradient(lora):
        def loss(lora, base, x):
            def layer(x, trees):
                return ql.apply(*trees, x), None

            return jnp.sum(jax.lax.scan(layer, x, (base, lora))[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(lora, base, x).compile()

    temporaries = [
        compile_gradient(tree).memory_analysis().temp_size_in_bytes
        for tree in (lora, {"kernel": ql.LoRA(*settings)})
    ]
    # The packed weights of a layer are kept, and a few columns in float.
    packed_size = k * n // 2
    assert temporaries[0] - temporaries[1] < 3 * packed_size, temporaries
    assert temporaries[0] < 1.3 * temporaries[1]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"merge_aware": False, "target_fmt": "nf4"}, "`merge_aware` must be True"),
        ({"fmt": None}, "`target_fmt` must be set"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"freeze_base": False}, "freeze_base=False"),
        ({"shared": ".*"}, "shared="),
        ({"target_fmt": "q4_k"}, "`target_fmt` must be one of .*'q4_0'"),
        ({"target_fmt": "int4_f16"}, "multiple of 128"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make((96, N), **options)
