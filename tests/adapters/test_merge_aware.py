"""Merge-aware adapters: what is trained is what `merge` packs, in every format."""

import dataclasses
import functools
import re

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
    fast_and_slow,
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
from qlora_jax.quant.pack import quantize_unchecked

K, N, RANK = 128, 72, 4


def make(shape=(K, N), seed=0, dtype="float32", **options):
    """A base and its adapter, as if it had been trained."""
    settings = {"rank": RANK, "alpha": 8, "merge_aware": True, "double_quant": False}
    config = ql.QLoRAConfig(**settings | options)
    key = jax.random.key(seed)
    base, lora = ql.init(key, {"kernel": normal(seed, shape, dtype)}, config)
    trained_b = normal(seed + 1, lora["kernel"].b.shape, scale=0.1)
    return base, {"kernel": dataclasses.replace(lora["kernel"], b=trained_b)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Packs 64 rows at a time."""
    monkeypatch.setattr(merge_aware, "TILE_BYTES", 4 * N * 65)


def power_of_two_from(w):
    """Returns the smallest power of two that is at least the largest magnitude."""
    return np.exp2(np.ceil(np.log2(np.abs(w).max()))).astype(np.float32)


def pack_and_decode(w, packing):
    """Decodes the weights that a format's reference packs, computed by NumPy."""
    pack = quantize_for_servers if packing.format.block_sizes else quantize
    largest = [power_of_two_from(w)] if packing.fmt == "nvfp4" else []
    codes, scales = pack(w, packing.fmt, packing.block_size, *largest)
    codes = codes.astype(np.uint8)
    return TABLES[packing.fmt][codes] * np.repeat(scales, packing.block_size, axis=0)


@pytest.mark.parametrize("fmt", fast_and_slow(["nf4"], [None, "int8"]))
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


@pytest.mark.newest
@pytest.mark.parametrize(
    "shape, options",
    [
        ((K, N), {"double_quant": True}),
        ((3, K, N), {"contract": "bkn"}),
        ((N, K), {"contract": -1}),
        ((192, 33), {"target_fmt": "int4", "alpha": 7, "dtype": "bfloat16"}),
        ((K, N), {"fmt": "int8", "target_fmt": "q4_0", "dtype": "bfloat16"}),
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
    is_nvfp4 = adapter.packing.fmt == "nvfp4"
    largest = [jnp.asarray(power_of_two_from(merged))] if is_nvfp4 else []
    want = quantize_unchecked(merged, adapter.packing, adapter.geometry, *largest)
    packed = ql.merge(base, lora, requantize=True)
    assert_same(packed["kernel"], want)
    *batch, k, _ = packed["kernel"].matrix_shape
    x = normal(2, (*batch, 5, k))
    bound = rounding(2 * k)
    assert relative_error(ql.apply(base, lora, x), ql.apply(packed, None, x)) < bound


@pytest.mark.parametrize("is_traced", [False, True])
def test_kernels_that_servers_fuse_get_one_factor(is_traced):
    # With the factor of q, the scales of v are subnormal numbers with too few bits.
    sizes = {"q_proj": 1.0, "k_proj": 0.125, "v_proj": 2.0**-13, "o_proj": 0.125}
    params = {
        name: {"kernel": normal(i, (K, N), scale=size)}
        for i, (name, size) in enumerate(sizes.items())
    }
    config = ql.QLoRAConfig(fmt=None, target_fmt="nvfp4", merge_aware=True, rank=RANK)
    base, lora = ql.init(jax.random.key(0), params, config)
    merge = functools.partial(ql.merge, requantize=True)
    packed = (jax.jit(merge) if is_traced else merge)(base, lora)
    factors = {}
    for name, layer in packed.items():
        want = pack_and_decode(np.asarray(params[name]["kernel"]), Packing("nvfp4"))
        np.testing.assert_array_equal(layer["kernel"].dequantize(), want)
        factors[name] = np.asarray(layer["kernel"].scale_scales).tolist()
    assert factors["q_proj"] == factors["k_proj"] != factors["v_proj"]
    assert factors["o_proj"] != factors["q_proj"]


def test_training_it_beats_packing_an_ordinary_adapter():
    # The base is in float, so that small changes of A B can move codes. As in models,
    # the inputs have a few strong directions, in which errors of packing can cancel.
    params = {"kernel": normal(0, (K, N))}
    x = normal(1, (256, 4)) @ normal(4, (4, K), scale=0.5)
    x += normal(5, x.shape, scale=0.1)
    change = normal(2, (K, 2)) @ normal(3, (2, N))
    target = x @ (params["kernel"] + 0.02 * change)
    packed_losses, trained_loss = {}, None
    kinds = {"ordinary": {}, "merge-aware": {"merge_aware": True, "target_fmt": "nf4"}}
    for name, options in kinds.items():
        config = ql.QLoRAConfig(rank=RANK, fmt=None, **options)
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
        trained_loss = float(loss(lora))
        packed = {"kernel": ql.quantize(ql.merge(base, lora)["kernel"], "nf4")}
        if options:
            packed = ql.merge(base, lora, requantize=True)
        packed_losses[name] = float(loss(None, packed))
    # The loss of the packed weights is the loss that was trained.
    error = relative_error(packed_losses["merge-aware"], trained_loss)
    assert error < rounding(2 * K)
    # Measured: 0.06 instead of 1.13. The base alone has a loss of 0.25.
    assert packed_losses["merge-aware"] < 0.2 * packed_losses["ordinary"]


@pytest.mark.newest
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


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_get_whole_blocks_of_both_formats(kind):
    # 192 rows are 3 blocks of the target, but each of 2 devices could have 96 rows of
    # the float base.
    base, lora = make((192, 96), fmt=None, target_fmt="nf4")
    x = normal(2, (8, 192))
    want = ql.apply(base, lora, x)
    mesh, rules = make_mesh(kind, axes=("fsdp", "tensor")), {"kernel": P("fsdp")}
    base, lora = ql.sharding.place(base, lora, mesh, rules)
    with jax.set_mesh(mesh):
        y = jax.jit(ql.apply)(base, lora, x)
    assert relative_error(y, want) < rounding(320)


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


@pytest.mark.newest
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


def test_only_the_base_the_factors_and_inputs_are_kept():
    k, layers, tokens = 2048, 4, 256

    def compile_gradient(**options):
        config = ql.QLoRAConfig(rank=RANK, **options)
        kernels = {"kernel": jax.ShapeDtypeStruct((layers, k, k), jnp.float32)}
        key, x = jax.random.key(0), jax.ShapeDtypeStruct((tokens, k), jnp.float32)
        trees = jax.eval_shape(lambda p: ql.init(key, p, config), kernels)

        def loss(lora, base, x):
            def layer(x, trees):
                return ql.apply(*trees, x), None

            return jnp.sum(jax.lax.scan(layer, x, (base, lora))[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(*trees[::-1], x).compile()

    ordinary, compiled = compile_gradient(), compile_gradient(merge_aware=True)
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (compiled, ordinary)]
    # Besides the inputs of layers, there are one layer's packed weights, and a tile.
    assert sizes[0] < 1.3 * sizes[1]
    assert sizes[0] < layers * tokens * k * 4 + 4 * (k * k // 2) + 8 * 2**20
    floats = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in floats]
    assert max(sizes) < k * k


@pytest.mark.newest
def test_second_derivatives_are_those_of_a_lora():
    # All sums are integers from -7 to 7, and 7 is in each block, so packing in int4
    # changes nothing, and the derivative of the packer is taken as 1.
    random = np.random.default_rng(0)
    w = random.integers(-3, 4, (2, 64, 64)).astype(np.float32)
    a = random.integers(0, 2, (2, 64, 1)).astype(np.float32)
    b = random.integers(0, 2, (2, 1, 64)).astype(np.float32)
    w[:, 0], a[:, 0] = 7, 0
    geometry = ql.quantize(w[0]).geometry
    packing = Packing("int4", double_quant=False)
    settings = a, b, 0.5, 0.0, geometry
    x, *direction = normal(1, (5, 64)), normal(2, a.shape), normal(3, b.shape)
    w = w - 0.5 * a @ b + np.round(0.5 * a @ b)  # so that the sums are integers

    def hessian_product(lora):
        def loss(lora):
            def layer(x, trees):
                return jnp.sin(0.05 * ql.apply(*trees, x)), None

            return jnp.sum(jax.lax.scan(layer, x, (w, lora))[0] ** 2)

        def slope(lora):
            grads = jax.grad(loss)(lora)
            return jnp.vdot(grads.a, direction[0]) + jnp.vdot(grads.b, direction[1])

        return jax.jit(jax.grad(slope))(lora)

    got = hessian_product(ql.MergeAware(*settings, packing))
    want = hessian_product(ql.LoRA(*settings))
    for name, array in want.arrays.items():
        assert relative_error(got.arrays[name], array) < rounding(64 * 64)


@pytest.mark.parametrize("target_fmt", FORMATS)
def test_nan_is_not_hidden_and_zeros_stay(target_fmt):
    base, lora = make(fmt=None, target_fmt=target_fmt, double_quant=None)
    adapter, x = lora["kernel"], jnp.ones((2, K))
    with_nan = dataclasses.replace(adapter, a=adapter.a.at[3].set(jnp.nan))
    assert jnp.isnan(ql.apply(base["kernel"], with_nan, x)).all()
    zero = dataclasses.replace(adapter, b=jnp.zeros_like(adapter.b))
    assert not ql.apply(jnp.zeros((K, N)), zero, x).any()


@pytest.mark.parametrize("use_jit", [False, True])
def test_a_float_kernel_must_be_frozen(use_jit):
    base, lora = make(fmt=None, target_fmt="nf4")

    def loss(base):
        return ql.apply(base, lora, jnp.ones((2, K))).sum()

    with pytest.raises(ValueError, match="must be frozen"):
        jax.grad(jax.jit(loss) if use_jit else loss)(base)


def test_kernels_that_do_not_fit_the_target_are_listed():
    params = {
        name: jnp.ones((k, 64)) for name, k in {"a": 96, "b": 128, "c": 48}.items()
    }
    options = {"rank": 1, "targets": ".", "merge_aware": True}
    config = ql.QLoRAConfig(target_fmt="int4_f16", **options)
    with pytest.raises(ValueError) as error:
        ql.init(jax.random.key(0), params, config)
    listed = re.findall(r"^  (.): .* Got (\d+)", str(error.value), re.M)
    assert listed == [("a", "96"), ("c", "48")]
    # Blocks are those of the kernel in its own format, and of the config for floats.
    packings = {
        ("nf4", None, 32): Packing("nf4", 32, True),
        ("nf4", "nf4", 32): Packing("nf4", 32, True),
        (None, "int4_f16", 32): Packing("int4_f16", 32),
        ("int8", "q4_0", 128): Packing("q4_0", 32),
        ("int8", "nf4", 128): Packing("nf4", 64, True),
    }
    for (fmt, target_fmt, block_size), packing in packings.items():
        settings = {"fmt": fmt, "target_fmt": target_fmt, "block_size": block_size}
        config = ql.QLoRAConfig(**options | {"targets": "b"}, **settings)
        assert ql.init(jax.random.key(0), params, config)[1]["b"].packing == packing


@pytest.mark.parametrize(
    "options, words",
    [
        ({"merge_aware": False, "target_fmt": "nf4"}, "`merge_aware` must be True"),
        ({"fmt": None}, "`target_fmt` must be set"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"freeze_base": False}, "freeze_base=False"),
        ({"target_fmt": "q4_k"}, "`target_fmt` must be one of .*'q4_0'"),
        ({"fmt": None, "target_fmt": "int4_f16"}, "blocks of 128, which must divide"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make((96, N), **options)


@pytest.mark.parametrize("b", [np.nan, 1e7])
def test_sums_that_cannot_be_packed_are_listed(b):
    base, lora = make(target_fmt="q4_0")  # whose scales are float16
    adapter = lora["kernel"]
    lora = {"kernel": dataclasses.replace(adapter, b=jnp.full_like(adapter.b, b))}
    words = r"cannot be packed:\n  kernel: weights must be finite"
    with pytest.raises(ValueError, match=words):
        ql.merge(base, lora, requantize=True)
