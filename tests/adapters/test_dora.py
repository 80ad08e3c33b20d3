"""DoRA against its formula in float64. tests/interop/test_peft.py has PEFT's."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from helpers import (
    assert_same,
    fast_and_slow,
    make_mesh,
    normal,
    spread,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.adapters.base import ProductCall, misfit_reason
from qlora_jax.adapters.dora import column_norms
from qlora_jax.quant.views import LayerOfStack

K, N, RANK, SCALING = 64, 24, 4, 2.0
CONFIG = ql.QLoRAConfig(rank=RANK, alpha=8, block_size=16, use_dora=True)


def make(shape=(K, N), **options):
    """A kernel and its adapter, with noise added as if it had been trained."""
    config = dataclasses.replace(CONFIG, **options)
    base, lora = ql.init(jax.random.key(0), {"kernel": normal(0, shape)}, config)

    def add_noise(x):
        return x + normal(x.size, x.shape, scale=0.1)

    return base["kernel"], jax.tree.map(add_noise, lora["kernel"])


def oracle(w, lora, x, g):
    """Product, merged weight and gradients of `sum(y * g)`, with constant norms."""

    def to_float64(v):
        return np.asarray(v, np.float64)

    w, a, b, m, x, g = map(to_float64, (w, lora.a, lora.b, lora.m, x, g))
    v = w + SCALING * a @ b
    scale = m / np.sqrt((v**2).sum(-2))
    gs, t = g * scale[..., None, :], lambda z: np.swapaxes(z, -1, -2)
    gradients = {
        "a": SCALING * t(x) @ gs @ t(b),
        "b": SCALING * t(x @ a) @ gs,
        "m": (g * (x @ v)).sum(-2) * scale / m,
        "x": gs @ t(v),
    }
    return x @ v * scale[..., None, :], v * scale[..., None, :], gradients


SHAPES = {
    "packed": ((K, N), {}),
    "float": ((K, N), {"fmt": None}),
    "trained": ((K, N), {"freeze_base": False}),
    "experts": ((3, K, N), {"contract": "bkn"}),
    "heads": ((K, 2, N // 2), {"contract": -3}),
}


@pytest.mark.parametrize(
    "name", fast_and_slow(["packed", "experts"], ["float", "trained", "heads"])
)
def test_values_and_gradients_are_those_of_the_formula(name):
    shape, options = SHAPES[name]
    kernel, lora = make(shape, **options)
    batch = shape[:1] if name == "experts" else ()
    x, g = normal(1, (*batch, 5, K)), normal(2, (*batch, 5, N))
    w = np.asarray(ql.dequantize(kernel)).reshape(*batch, K, N)
    y, merged, want = oracle(w, lora, x, g)

    def loss(lora, x):
        got = ql.apply(kernel, lora, x).reshape(g.shape)
        return jnp.vdot(got, g), got

    (grads, dx), got = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(lora, x)
    assert_close(got, y, terms=64)
    assert_close(dx, want["x"], terms=64)
    for name, value in grads.arrays.items():
        assert_close(value, want[name], terms=64)
    merged_by_library = ql.merge(kernel, lora)
    assert merged_by_library.shape == shape
    assert_close(merged_by_library.reshape(merged.shape), merged, terms=64)


def test_it_starts_by_adding_nothing():
    """The magnitudes are the norms of the packed weights, not of the float ones."""
    params = {"kernel": normal(1, (2, K, N))}
    base, lora = ql.init(jax.random.key(0), params, CONFIG)
    w = np.asarray(ql.dequantize(base)["kernel"], np.float64)
    m = lora["kernel"].m
    assert_close(m, np.sqrt((w**2).sum(-2)), terms=64)
    assert m.shape == (2, N) and m.dtype == jnp.float32
    x = jnp.ones((2, 3, K))
    assert_close(ql.apply(base, lora, x), x @ w, terms=64)
    half = dataclasses.replace(CONFIG, lora_dtype="bfloat16")
    _, lora = ql.init(jax.random.key(0), params, half)
    assert lora["kernel"].a.dtype == jnp.bfloat16
    assert lora["kernel"].m.dtype == jnp.float32


def test_dropout_acts_on_both_products_as_in_peft():
    """`x W + (m / c - 1) (x' W) + m / c * scaling * (x' A) B` for dropped-out x'."""
    kernel, lora = make(dropout=0.5)
    x = normal(1, (5, K))
    key = jax.random.key(2)
    dropped_x = np.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * np.asarray(x), 0)
    w = np.asarray(ql.dequantize(kernel), np.float64)
    a, b, m = (np.asarray(v, np.float64) for v in (lora.a, lora.b, lora.m))
    scale = m / np.sqrt(((w + SCALING * a @ b) ** 2).sum(0))
    want = x @ w + (scale - 1) * (dropped_x @ w) + scale * SCALING * (dropped_x @ a @ b)
    assert_close(ql.apply(kernel, lora, x, dropout_key=key), want, terms=64)


def test_a_layer_of_a_stack_is_that_layer():
    kernel, lora = make((2, K, N))
    layer, x = jax.tree.map(lambda a: a[1], kernel), jnp.ones((3, K))
    got = ql.apply(LayerOfStack(kernel, jnp.int32(1)), lora.at((1,)), x)
    np.testing.assert_array_equal(got, ql.apply(layer, lora.at((1,)), x))
    low = ql.apply(layer, lora.at((1,)), x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    # Both products, their sum and the product with the scale are rounded.
    assert_close(low, np.asarray(got, np.float64), roundings=4)


def test_columns_of_zeros_stay_zero_and_cancelled_ones_finite():
    w = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
    w[:, 0] = 0
    config = ql.QLoRAConfig(rank=1, fmt=None, use_dora=True)
    base, lora = ql.init(jax.random.key(0), {"kernel": w}, config)
    lora = lora["kernel"]
    b = jnp.zeros((1, N)).at[0, 1].set(1)
    lora = dataclasses.replace(lora, a=jnp.asarray(-w[:, 1:2]), b=b)

    def loss(lora, x):
        return jnp.sum(ql.apply(base["kernel"], lora, x) ** 2)

    x = jnp.ones((3, K))
    y, grads = ql.apply(base["kernel"], lora, x), jax.grad(loss, (0, 1))(lora, x)
    assert not np.asarray(y[:, 0]).any()
    for array in (y, *jax.tree.leaves(grads)):
        assert np.isfinite(np.asarray(array)).all()


def test_norms_take_no_float_kernel():
    """One device decodes a few columns at a time. The last group overlaps another."""
    k, n = 1024, 2100
    q = ql.quantize(normal(0, (k, n)))
    lora = ql.LoRA(jnp.ones((k, 2)), jnp.zeros((2, n)), 1.0, 0.0, q.geometry)
    norms = functools.partial(column_norms, call=ProductCall(), dtype="float32")
    compiled = jax.jit(on_one_device(norms)).lower(lora, q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * 4 * k * n
    w = np.asarray(ql.dequantize(q), np.float64)
    assert_close(compiled(lora, q), np.sqrt((w**2).sum(0)), terms=64)


def on_one_device(run):
    """The function inside a `shard_map` over one device."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_step_on_a_mesh_equals_that_of_one_device(kind):
    kernel, lora = make((3, K, 64), contract="kn")
    mesh = make_mesh(kind, axes=("fsdp", "tensor"))

    def loss(lora, kernel, x):
        def layer(h, args):
            y = jnp.tanh(ql.apply(*args, h))
            if AxisType.Explicit in jax.typeof(h).sharding.mesh.axis_types:
                y = jax.sharding.reshard(y, jax.typeof(h).sharding)
            return h + y, None

        return jnp.mean(jax.lax.scan(layer, x, (kernel, lora))[0] ** 2)

    step = jax.jit(jax.grad(loss, argnums=(0, 2)))
    x = normal(1, (8, K))
    want = step(lora, kernel, x)
    trees, rules = ({"k": kernel}, {"k": lora}), {"k": P(None, "fsdp", "tensor")}
    base, adapters = ql.sharding.place(*trees, mesh, rules, rows=["fsdp"])
    # Sharded as B is: over the axes of N, then of K.
    assert adapters["k"].m.sharding.spec == P(None, ("tensor", "fsdp"))
    with jax.set_mesh(mesh):
        args = adapters["k"], base["k"], spread(x, mesh, "fsdp")
        placed = step.lower(*args).compile()
        got = placed(*args)
    if kind == "Auto":
        # Packed weights are gathered for the product and its gradient, not for norms.
        assert len(re.findall(r" = u8\[.*? all-gather\(", placed.as_text())) == 2
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want))


def test_files_and_trees_know_its_arrays(tmp_path):
    kernel, lora = make()
    base, adapters = {"kernel": kernel}, {"kernel": lora}
    ql.io.save(tmp_path / "lora", adapters)
    restored = ql.io.restore(tmp_path / "lora").tree["kernel"]
    assert ql.linen  # registers state dicts
    state = serialization.from_bytes(lora, serialization.to_bytes(lora))
    for copy in (restored, state):
        assert_same(copy, lora)
    row = ql.summary(base, adapters).lora[0]
    assert (row.shape, row.fmt) == (f"[{K},{RANK}][{RANK},{N}][{N}]", "dora")
    labels = ql.lora_labels(ql.combine(base, adapters))
    assert jax.tree.leaves(labels["kernel"].lora) == ["lora"] * 3
    short = jax.tree.map(lambda x: x[..., :-1] if x.ndim == 1 else x, lora)
    reason = misfit_reason(short, kernel)
    assert reason is not None and "M [24]" in reason and "[23]" in reason


def test_an_nnx_model_takes_adapters_of_another_kind():
    model = nnx.Linear(K, N, use_bias=False, rngs=nnx.Rngs(0))
    plain = ql.QLoRAConfig(rank=RANK, alpha=8, block_size=16)
    wrapped = ql.nnx.wrap(model, plain, rngs=nnx.Rngs(1))
    kernel, lora = make()
    joined = ql.nnx.join(wrapped, {"kernel": kernel}, {"kernel": lora})
    x = jnp.ones((2, K))
    np.testing.assert_array_equal(joined(x), ql.apply(kernel, lora, x))
    assert isinstance(joined.kernel_lora.m, nnx.LoRAParam)
    again = ql.nnx.join(joined, *ql.nnx.split(wrapped))
    np.testing.assert_array_equal(again(x), wrapped(x))


def test_peft_files_have_its_magnitudes_and_all_weights_of_a_stack(tmp_path):
    names = ql.io.Names({"q_proj/kernel": "model.layers.{layer}.q_proj.weight"})
    kernel, lora = make((2, K, N))
    base, adapters = {"q_proj": {"kernel": kernel}}, {"q_proj": {"kernel": lora}}
    ql.io.save_peft(tmp_path / "a", base, adapters, names)
    file = ql.io.open_safetensors(tmp_path / "a" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.q_proj.lora_magnitude_vector"
    np.testing.assert_array_equal(file[key][...], lora.m[1])
    _, loaded, settings = ql.io.load_peft(tmp_path / "a", base, names)
    assert_same(loaded["q_proj"]["kernel"], lora)
    _, loaded, _ = ql.io.load_peft(tmp_path / "a", base, names, dtype="bfloat16")
    assert loaded["q_proj"]["kernel"].a.dtype == jnp.bfloat16
    assert loaded["q_proj"]["kernel"].m.dtype == jnp.float32
    single_layer = dataclasses.replace(settings, layers_to_transform=1)
    message = "every weight of a stack must have an adapter"
    with pytest.raises(ValueError, match=message):
        ql.io.save_peft(tmp_path / "b", base, adapters, names, single_layer)
    plain = dataclasses.replace(settings, use_dora=False)
    with pytest.raises(ValueError, match="its type must be LoRA.* Got DoRA"):
        ql.io.save_peft(tmp_path / "b", base, adapters, names, plain)
