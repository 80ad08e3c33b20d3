"""Sharded operands, in Auto and Explicit mode, give the unsharded result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    dequantize,
    make_mesh,
    normal,
    relative_error,
    spread,
    trees_of,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import assert_close

import qlora_jax as ql

P = PartitionSpec


def arrays():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(256, 64)).astype(np.float32)
    return w, rng.normal(size=(8, 256)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("b"), P("a"), P("a", "b")])
@pytest.mark.parametrize("freeze_base", [True, False])
def test_merge(mesh, spec, freeze_base):
    """K has six blocks, which the mesh axis of size four does not divide."""
    tree = {"kernel": np.asarray(normal(0, (384, 64)))}
    settings = {"rank": 4, "freeze_base": freeze_base}
    base, lora = trees_of(tree, **settings)
    a, b = (np.asarray(x, np.float64) for x in jax.tree.leaves(lora))
    want = dequantize(ql.quantize(tree["kernel"])) + a @ b
    tree = spread(tree, mesh, *spec)
    base = ql.quantize(tree, ql.QLoRAConfig(**settings))
    got = ql.merge(base, lora)["kernel"]
    assert_close(got, want, terms=64)
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
    assert_close(run(spread(x, mesh, "a"), base, lora), want)


def test_an_explicit_result_has_its_sharding_in_its_type():
    mesh = make_mesh("Explicit")
    w, x = arrays()
    q = ql.quantize(spread(w, mesh, None, "b"))
    assert jax.typeof(q.codes).sharding.spec == P(None, "b")
    assert jax.typeof(q.scales).sharding.spec == P(None, "b")
    y = ql.matmul(spread(x, mesh, "a"), q)
    assert jax.typeof(y).sharding.spec == P("a", "b")
    assert jax.typeof(ql.dequantize(q)).sharding.spec == P(None, "b")


# The shape of W, its format, block size and spec. test_collectives.py has all layouts.
KERNELS = {
    "rows and columns": ((256, 64), "nf4", 64, P("a", "b")),
    "rows and columns of 8 bits": ((256, 64), "int8", 64, P("a", "b")),
    "columns over both": ((256, 64), "int8", 64, P(None, ("a", "b"))),
    "rows and columns of layers": ((3, 256, 64), "nf4", 64, P(None, "a", "b")),
    "experts over both": ((8, 128, 8), "nf4", 64, P(("a", "b"))),
    "a stack, columns": ((4, 96, 6), "nf4", 32, P("a", None, "b")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_eager_quantize_product_and_gradient(mesh, name):
    shape, fmt, block_size, spec = KERNELS[name]
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    want = ql.quantize(w, fmt, block_size=block_size)
    sharding = NamedSharding(mesh, spec)
    q = ql.quantize(jax.device_put(w, sharding), fmt, block_size=block_size)
    np.testing.assert_array_equal(q.codes, want.codes)
    assert q.codes.sharding.is_equivalent_to(sharding, w.ndim)
    floats = dequantize(want)
    assert_close(ql.dequantize(q), floats, terms=64)
    # The mean of the scales is summed in another order.
    assert np.abs(np.asarray(q.scales, int) - np.asarray(want.scales, int)).max() <= 1
    x = np.ones((*shape[:-2], 8, shape[-2]), np.float32)
    with jax.set_mesh(mesh):  # an eager gradient needs to know the mesh
        y, pull = jax.vjp(lambda x: ql.matmul(x, q), spread(x, mesh))
        (dx,) = pull(y)
    assert_close(y, x @ floats)
    assert_close(dx, x @ floats @ np.swapaxes(floats, -1, -2))


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
    # Heads and head features are a single axis of the stored matrix.
    stored = NamedSharding(mesh, P(spec[0], spec[-1]))
    assert base["kernel"].codes.sharding.is_equivalent_to(stored, 2)
    with jax.set_mesh(mesh):
        got = run(spread(lora, mesh), base, spread(x, mesh, *x_spec))
    assert_close(got, want)
