"""`vmap` over an axis that a mesh splits: Explicit axes, as Equinox batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantize, make_mesh, relative_error
from jax.sharding import NamedSharding, PartitionSpec

import qlora_jax as ql

P = PartitionSpec
# Nested calls of vmap, how x is split, and how the kernel is placed, if it is.
ROWS = {
    "not placed": (1, P("a"), None),
    "over both axes": (1, P(("a", "b")), P("a", "b")),
    "of a row over a": (1, P("a", None, "b"), P("a", "b")),
    "of rows over b": (1, P("a", "b"), P("b", "a")),
    "nested": (2, P("a", "b"), P("a", "b")),
    "nested, not placed": (2, P("a", "b"), None),
}


def draw(fmt, lead=()):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"kernel": normal(*lead, 64, 32)}
    config = ql.QLoRAConfig(
        rank=4, block_size=16, fmt=fmt, double_quant=False, contract=-2
    )
    base, lora = ql.init(jax.random.key(0), params, config)
    lora = jax.tree.map(lambda a: a + normal(*a.shape) / 8, lora)
    w = dequantize(base["kernel"]) if fmt else params["kernel"]
    return base, lora, w, normal(8, 4, 64)


def gradients(w, lora, x):
    """Those of the sum of sin y in A, B (of each kernel of a stack), and x."""
    turned = lambda a: np.swapaxes(a, -1, -2)
    a, b = (np.asarray(p, np.float64) for p in jax.tree.leaves(lora))
    dy = np.cos(x @ w + x @ a @ b)
    dh = dy @ turned(b)
    da, db = turned(x) @ dh, turned(x @ a) @ dy
    summed = lambda d: d if a.ndim == 3 else d.sum(0)
    return summed(da), summed(db), dy @ turned(w) + dh @ turned(a)


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("fmt", [None, "nf4"])
def test_rows(fmt, name):
    nested, x_spec, kernel_spec = ROWS[name]
    mesh = make_mesh("Explicit")
    base, lora, w, x = draw(fmt)
    want = gradients(w, lora, x)
    if kernel_spec is not None:
        rules = {"kernel": kernel_spec}
        base, lora = ql.sharding.place(base, lora, mesh, rules, rows=["a"])
    x = jax.device_put(x, NamedSharding(mesh, x_spec))

    def loss(lora, x):
        run = lambda x: ql.apply(base, lora, x)
        for _ in range(nested):
            run = jax.vmap(run)
        return jnp.sum(jnp.sin(run(x)))

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss, (0, 1)))(lora, x)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("is_inside", [False, True], ids=["vmap", "gradients in it"])
def test_kernels_and_their_adapters(is_inside):
    """Each has rows of its own; the mesh splits the stack."""
    mesh = make_mesh("Explicit")
    base, lora, w, x = draw("nf4", lead=(8,))
    want = gradients(w, lora, x)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P("a", *spec)))
    base, lora = jax.tree.map(lambda a: put(a, "b"), (base, lora))
    x = put(x, None, "b")

    def loss(lora, x, base):
        return jnp.sum(jnp.sin(ql.apply(base, lora, x)))

    run = jax.grad(lambda *args: jnp.sum(jax.vmap(loss)(*args)), (0, 1))
    if is_inside:
        run = jax.vmap(jax.grad(loss, (0, 1)))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(lora, x, base)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_the_mesh_axis_is_named(kind):
    mesh = make_mesh(kind)
    base, lora, w, x = draw("nf4")
    want = gradients(w, lora, x)
    rules = {"kernel": P("a", "b")}
    base, lora = ql.sharding.place(base, lora, mesh, rules, rows=["a"])
    x = jax.device_put(x, NamedSharding(mesh, P("a")))

    def loss(lora, x):
        run = jax.vmap(lambda x: ql.apply(base, lora, x), spmd_axis_name="a")
        return jnp.sum(jnp.sin(run(x)))

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss, (0, 1)))(lora, x)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        assert relative_error(a, b) < 1e-5
