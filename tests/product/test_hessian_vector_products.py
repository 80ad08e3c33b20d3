"""Products with the Hessian, by reverse mode twice, through a scan over layers."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import ANY_BLOCK, SERVED, normal
from tolerances import assert_close

import qlora_jax as ql

SIZE, ROWS, LAYERS = 256, 8, 3
PACKINGS = [
    (fmt, 64, double_quant) for fmt in ANY_BLOCK for double_quant in (False, True)
]
PACKINGS += [(fmt, size, False) for fmt, size in SERVED if size != 64]
KINDS = ["shared", "scanned", "layer"]


def loss(kind, lora, kernel, x):
    """A loss through a scan over layers, or over one kernel several times."""

    def step(x, layer):
        index, one_kernel, one_lora = layer
        if kind == "layer":
            y = ql.matmul(x, kernel, layer=index) + (x @ lora.a[0]) @ lora.b[0]
        elif kind == "shared":
            y = ql.apply(kernel, lora, x)
        else:
            y = ql.apply(one_kernel, one_lora, x)
        return jnp.tanh(y), None

    scanned = (kernel, lora) if kind == "scanned" else (None, None)
    return jnp.sum(jax.lax.scan(step, x, (jnp.arange(LAYERS), *scanned))[0] ** 2)


def hessian_vector_product(kind, lora, kernel, x):
    gradient = jax.grad(functools.partial(loss, kind))

    def sum_of_gradient(lora):
        return sum(map(jnp.sum, jax.tree.leaves(gradient(lora, kernel, x))))

    return jax.grad(sum_of_gradient)(lora)


def operands(kind, fmt, block_size, double_quant):
    count = {"shared": (), "scanned": (LAYERS,), "layer": (LAYERS,)}
    w = normal(0, (*count[kind], SIZE, SIZE), scale=SIZE**-0.5)
    settings = dict(fmt=fmt, block_size=block_size, double_quant=double_quant)
    base, lora = ql.init(
        jax.random.key(0), {"w": w}, ql.QLoRAConfig(rank=2, targets="w", **settings)
    )
    lora = jax.tree.map(lambda a: normal(1, a.shape, scale=0.05), lora["w"])
    return lora, base["w"], normal(2, (ROWS, SIZE))


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_format_is_traced(packing):
    """JAX may treat constants of a custom gradient as its arguments."""
    make = functools.partial(operands, "shared", *packing)

    def run():
        return hessian_vector_product("shared", *make())

    want = jax.eval_shape(lambda: make()[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(run), want)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_that_of_the_float_kernel(kind):
    lora, kernel, x = operands(kind, "nf4", 64, True)
    got = jax.jit(functools.partial(hessian_vector_product, kind))(lora, kernel, x)
    w = ql.dequantize(kernel)

    def dense(lora):
        y = x
        for i in range(LAYERS):
            weight, a, b = w, lora.a, lora.b
            if kind in ("scanned", "layer"):
                j = i if kind == "scanned" else 0
                weight, a, b = w[i], lora.a[j], lora.b[j]
            scaling = 1.0 if kind == "layer" else lora.scaling
            y = y @ weight + y @ a @ b * scaling
            y = jnp.tanh(y)
        return jnp.sum(y**2)

    def sum_of_gradient(lora):
        return sum(map(jnp.sum, jax.tree.leaves(jax.grad(dense)(lora))))

    assert_close(got, jax.jit(jax.grad(sum_of_gradient))(lora))


@pytest.mark.slow
@pytest.mark.parametrize("has_adapter", [True, False])
def test_of_experts_equals_that_of_each_rows_matrix(has_adapter):
    """Of packed experts with adapters, and of float experts."""
    w, group_sizes = normal(0, (3, 64, 16)), jnp.array([2, 0, 4])
    config = ql.QLoRAConfig(rank=2, targets="w")
    base, lora = ql.init(jax.random.key(0), {"w": w}, config)
    lora = jax.tree.map(lambda a: normal(1, a.shape), lora["w"])
    x, experts = normal(2, (6, 64)), jnp.repeat(jnp.arange(3), group_sizes)

    def merged(lora):
        return ql.dequantize(base["w"]) + lora.scaling * lora.a @ lora.b

    def ragged(lora, x):
        kernel = merged(lora)
        if has_adapter:
            kernel = ql.combine(base, {"w": lora})["w"]
        return ql.ragged_dot(x, kernel, group_sizes)

    def by_row(lora, x):
        return jnp.einsum("mk,mkn->mn", x, merged(lora)[experts])

    def hessian_product(product):
        def gradient(lora, x):
            return jax.grad(lambda *args: jnp.sum(jnp.sin(product(*args))), (0, 1))(
                lora, x
            )

        _, pull = jax.vjp(gradient, lora, x)
        return pull(gradient(lora, x))

    assert_close(hessian_product(ragged), hessian_product(by_row))
