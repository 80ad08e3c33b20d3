"""`vmap` over an axis that a mesh splits, with Explicit axes, as Equinox batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_layouts import gradients
from helpers import dequantize, make_mesh, normal, spread, trees_of
from jax.sharding import PartitionSpec
from tolerances import assert_close

import qlora_jax as ql

pytestmark = pytest.mark.newest
P = PartitionSpec
# Nested calls of vmap, how x is split, and how the kernel is placed, if it is.
ROWS = {
    "not placed": (1, P("a"), None),
    "over both axes": (1, P(("a", "b")), P("a", "b")),
    "of a row over a": (1, P("a", None, "b"), P("a", "b")),
    "of rows over b": (1, P("a", "b"), P("b", "a")),
    "nested": (2, P("a", "b"), P("a", "b")),
    "named axis": (1, P("a"), P("a", "b")),
    "nested, not placed": (2, P("a", "b"), None),
}


def draw(fmt, lead=()):
    """Returns both trees, an input, and the gradients of sum(sin y) in A, B and x."""
    params, x = {"kernel": normal(0, (*lead, 64, 32))}, normal(1, (8, 4, 64))
    settings = {"rank": 4, "block_size": 16, "double_quant": False, "contract": -2}
    base, lora = trees_of(params, fmt=fmt, **settings)
    w = dequantize(base["kernel"]) if fmt else np.asarray(params["kernel"])

    def to_float64(a):
        return np.asarray(a, np.float64)

    layer = [to_float64(w), *map(to_float64, jax.tree.leaves(lora))]
    ((da, db),), dx = gradients([layer], [False], to_float64(x))
    if not lead:  # all rows share one adapter
        da, db = da.sum(0), db.sum(0)
    return base, lora, x, [da, db, dx]


CASES = [*((name, "Explicit") for name in ROWS), ("named axis", "Auto")]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("fmt", [None, "nf4"])
def test_rows(fmt, name, kind):
    nested, x_spec, kernel_spec = ROWS[name]
    mesh, axis = make_mesh(kind), "a" if name == "named axis" else None
    base, lora, x, want = draw(fmt)
    if kernel_spec is not None:
        rules = {"kernel": kernel_spec}
        base, lora = ql.sharding.place(base, lora, mesh, rules, rows=["a"])
    x = spread(x, mesh, *x_spec)

    def loss(lora, x):
        def run(x):
            return ql.apply(base, lora, x)

        for _ in range(nested):
            run = jax.vmap(run, spmd_axis_name=axis)
        return jnp.sum(jnp.sin(run(x)))

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss, (0, 1)))(lora, x)
    assert_close(jax.tree.leaves(got), jax.tree.map(np.float32, want))


@pytest.mark.parametrize("is_inside", [False, True], ids=["vmap", "gradients in it"])
def test_kernels_and_their_adapters(is_inside):
    """Each kernel has its own rows, and the mesh splits the stack."""
    mesh = make_mesh("Explicit")
    base, lora, x, want = draw("nf4", lead=(8,))
    base, lora = spread((base, lora), mesh, "a", "b")
    x = spread(x, mesh, "a", None, "b")

    def loss(lora, x, base):
        return jnp.sum(jnp.sin(ql.apply(base, lora, x)))

    run = jax.grad(lambda *args: jnp.sum(jax.vmap(loss)(*args)), (0, 1))
    if is_inside:
        run = jax.vmap(jax.grad(loss, (0, 1)))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(lora, x, base)
    assert_close(jax.tree.leaves(got), jax.tree.map(np.float32, want))
