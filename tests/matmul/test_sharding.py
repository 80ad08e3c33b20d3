"""Sharded operands, in Auto and Explicit mode, give the unsharded result."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    close,
    dequantize,
    make_mesh,
    normal,
    relative_error,
    rounding,
    spread,
    trees_of,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qlora_jax as ql

P = PartitionSpec
# Name: the spec of W [K, N], the spec of x [M, K].
LAYOUTS = {
    "column": (P(None, "b"), P("a", None)),
    "row": (P("b", None), P("a", "b")),
    "fsdp": (P("a", None), P("a", None)),
    "2d": (P("a", "b"), P(None, "a")),
    "both axes": (P(None, ("a", "b")), P()),
}


def arrays():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(256, 64)).astype(np.float32)
    return w, rng.normal(size=(8, 256)).astype(np.float32)


# test_collectives.py has the product and its gradient in every layout. Codes of 8 bits
# where K is split, and where it is not.
FORMATS = [(layout, "nf4") for layout in ("row", "fsdp", "2d", "both axes")]
FORMATS += [(layout, "int8") for layout in ("column", "2d")]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "fmt"), FORMATS)
def test_quantize_product_and_gradient(mesh, layout, fmt):
    w, x = arrays()
    w_spec, x_spec = LAYOUTS[layout]
    want_q = ql.quantize(w, fmt)
    sharded_w, sharded_x = spread(w, mesh, *w_spec), spread(x, mesh, *x_spec)
    q = ql.quantize(sharded_w, fmt)
    np.testing.assert_array_equal(q.codes, want_q.codes)
    # The mean of the scales is summed in another order.
    scales = jax.tree.leaves(q)[1:], jax.tree.leaves(want_q)[1:]
    chex.assert_trees_all_close(*scales, rtol=1e-5, atol=1e-6)
    floats = np.asarray(ql.dequantize(want_q))
    assert relative_error(ql.dequantize(q), floats) < 1e-6
    run = lambda x, q: jnp.sum(jnp.sin(ql.matmul(x, q)))
    y = x.astype(np.float64) @ floats
    want, grad = np.sin(y), np.cos(y) @ floats.T
    bound = y.std() * rounding(256)  # of the angle
    for transform in (lambda f: f, jax.jit):
        y = transform(ql.matmul)(sharded_x, q)
        assert relative_error(jnp.sin(y), want) < bound
        with jax.set_mesh(mesh):  # an eager gradient needs to know the mesh
            got = transform(jax.grad(run))(sharded_x, q)
        assert relative_error(got, grad) < bound


# Others have steps on packed kernels, and random layouts: test_collectives.py,
# test_random_layouts.py.
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["row", "fsdp"])
@pytest.mark.parametrize("kind", ["float", "trained"])
def test_a_training_step(mesh, layout, kind):
    """A is split along K as W is, and B along N."""
    w, x = arrays()
    w_spec, x_spec = LAYOUTS[layout]
    params = {"kernel": w, "bias": np.zeros(64, np.float32)}
    settings = {"rank": 4, "freeze_base": kind != "trained"}
    _, lora = trees_of(params, **settings)
    loss = lambda lora, base, x: jnp.sum(ql.apply(base, lora, x) ** 2)
    floats = dequantize(ql.quantize(w))
    merged = lambda lora: floats + lora["kernel"].a @ lora["kernel"].b
    dense = lambda lora, x: jnp.sum((x @ merged(lora)) ** 2)
    want = jax.jit(jax.grad(dense, argnums=(0, 1)))(lora, x)

    params = {"kernel": spread(w, mesh, *w_spec), "bias": spread(params["bias"], mesh)}
    base = ql.quantize(params, ql.QLoRAConfig(**settings))
    base = ql.dequantize(base) if kind == "float" else base
    a, b = spread(lora["kernel"].a, mesh, w_spec[0]), spread(lora["kernel"].b, mesh)
    lora = {"kernel": dataclasses.replace(lora["kernel"], a=a, b=b)}
    got = jax.jit(jax.grad(loss, argnums=(0, 2)))(lora, base, spread(x, mesh, *x_spec))
    close(got, want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["row", "fsdp", "2d"])
@pytest.mark.parametrize("freeze_base", [True, False])
def test_merge(mesh, layout, freeze_base):
    """Six blocks of K, which no mesh axis of four divides."""
    tree = {"kernel": np.asarray(normal(0, (384, 64)))}
    settings = {"rank": 4, "freeze_base": freeze_base}
    base, lora = trees_of(tree, **settings)
    a, b = (np.asarray(x, np.float64) for x in jax.tree.leaves(lora))
    want = dequantize(ql.quantize(tree["kernel"])) + a @ b
    tree = spread(tree, mesh, *LAYOUTS[layout][0])
    base = ql.quantize(tree, ql.QLoRAConfig(**settings))
    got = ql.merge(base, lora)["kernel"]
    assert relative_error(got, want) < 1e-6
    if mesh.axis_types[0] == AxisType.Explicit:
        assert not got.sharding.is_fully_replicated


@pytest.mark.slow
def test_dropout(mesh):
    """The mask is the same however x is sharded."""
    w, x = arrays()
    base, lora = trees_of({"kernel": w}, rank=4, dropout=0.5)
    key = jax.random.key(1)
    run = jax.jit(lambda x, *trees: ql.apply(*trees, x, dropout_key=key))
    want = run(x, base, lora)
    assert relative_error(want, ql.apply(base, lora, x)) > 0.01
    base = ql.quantize({"kernel": spread(w, mesh, None, "b")}, ql.QLoRAConfig())
    assert relative_error(run(spread(x, mesh, "a"), base, lora), want) < 1e-5


def test_an_explicit_result_has_its_sharding_in_its_type():
    mesh = make_mesh("Explicit")
    w, x = arrays()
    q = ql.quantize(spread(w, mesh, None, "b"))
    assert jax.typeof(q.codes).sharding.spec == P(None, "b")
    assert jax.typeof(q.scales).sharding.spec == P(None, "b")
    y = ql.matmul(spread(x, mesh, "a"), q)
    assert jax.typeof(y).sharding.spec == P("a", "b")
    assert jax.typeof(ql.dequantize(q)).sharding.spec == P(None, "b")


# Stacks, experts, odd and short last blocks: the shape of W, its block size and spec.
STACKS = {
    "rows and columns of layers": ((3, 256, 64), 64, P(None, "a", "b")),
    "experts over both": ((8, 128, 8), 64, P(("a", "b"))),
    "odd K, columns": ((4, 67, 6), 32, P("a", None, "b")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_quantize_a_stack(mesh, name):
    shape, block_size, spec = STACKS[name]
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    want = ql.quantize(w, block_size=block_size)
    sharding = NamedSharding(mesh, spec)
    q = ql.quantize(jax.device_put(w, sharding), block_size=block_size)
    np.testing.assert_array_equal(q.codes, want.codes)
    assert q.codes.sharding.is_equivalent_to(sharding, 3)
    assert relative_error(ql.dequantize(q), dequantize(want)) < 1e-6
    # The mean of the scales is summed in another order.
    assert np.abs(np.asarray(q.scales, int) - np.asarray(want.scales, int)).max() <= 1


# The shape of W, its contracted axes, its spec, and the shape and spec of x.
HEADS = {
    "into heads, rows too": ((64, 4, 8), -3, ("b", "a"), (6, 64), (None, "b")),
    "out of heads, columns": ((4, 8, 64), (-3, -2), ("a", None, "b"), (6, 4, 8), ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_attention_kernels(mesh, name):
    """Head-split kernels, sharded over heads, with adapters."""
    shape, contract, spec, x_shape, x_spec = HEADS[name]
    params, x = {"kernel": np.asarray(normal(0, shape))}, np.asarray(normal(1, x_shape))
    settings = {"rank": 2, "block_size": 16, "contract": {".*": contract}}
    base, lora = trees_of(params, **settings)

    def loss(lora, base, x):
        y = ql.apply(base, lora, x)
        return jnp.sum(y**2), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
    want = run(lora, ql.dequantize(base), x)
    base = ql.quantize(spread(params, mesh, *spec), ql.QLoRAConfig(**settings))
    # Heads and what is within them are one axis of the stored matrix.
    stored = NamedSharding(mesh, P(spec[0], spec[-1]))
    assert base["kernel"].codes.sharding.is_equivalent_to(stored, 2)
    with jax.set_mesh(mesh):
        got = run(spread(lora, mesh), base, spread(x, mesh, *x_spec))
    close(got, want, 1e-5)
