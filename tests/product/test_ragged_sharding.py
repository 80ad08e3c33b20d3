"""Ragged products and adapters of experts on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantize, ragged_product, slow_but_every, spread
from hlo_text import collectives, most_floats
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql

EXPERTS, ROWS, K, N, RANK = 8, 64, 512, 128, 4
SIZES = np.array([5, 0, 17, 9, 1, 20, 0, 8], np.int32)  # 60 of 64 rows
NONE: list[str] = []
REDUCE, GATHER = ["all-reduce f32"], ["all-gather u8"]
# How W [E, K, N], x [M, K] and y [M, N] are split, and what each pass must move.
LAYOUTS = {
    "experts": (P("a"), P(), P(), REDUCE, REDUCE),
    "data": (P(), P("a"), P("a"), NONE, NONE),
    "fsdp over experts": (P("a"), P("a"), P("a"), GATHER, GATHER),
    "fsdp along K": (P(None, "a"), P("a"), P("a"), GATHER, GATHER),
    "experts and column": (P("a", None, "b"), P(), P(None, "b"), REDUCE, REDUCE),
    "experts and row": (P("a", "b"), P(None, "b"), P(), REDUCE, REDUCE),
    "fsdp and experts": (
        *(P("b", "a"), P("a"), P("a")),
        *(GATHER + REDUCE, GATHER + REDUCE),
    ),
    "experts over both": (P(("a", "b")), P(), P(), REDUCE, REDUCE),
    "fsdp over experts and both": (P(("b", "a")), P("a"), P("a"), None, None),
}


@functools.cache
def operands(**settings):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(EXPERTS, K, N)).astype(np.float32)
    x = rng.normal(size=(ROWS, K)).astype(np.float32)
    q = ql.quantize(w, double_quant=False)
    config = ql.QLoRAConfig(rank=RANK, alpha=8, targets="w", **settings)
    _, lora = ql.init(jax.random.key(0), {"w": q}, config)

    def draw(a):
        return rng.normal(size=a.shape).astype(np.float32) / 10

    return jax.tree.map(np.asarray, q), jax.tree.map(draw, lora["w"]), x


def placed(mesh, layout, **settings):
    w_spec, x_spec, *_ = LAYOUTS[layout]
    q, lora, x = operands(**settings)
    base, lora = ql.sharding.place(
        {"w": q}, {"w": lora}, mesh, {"w": w_spec}, rows=x_spec[:1]
    )
    return base["w"], lora["w"], spread(x, mesh, *x_spec), spread(SIZES, mesh)


@pytest.mark.parametrize("layout", slow_but_every(3, LAYOUTS))
def test_forward_and_backward(mesh, layout):
    _, x_spec, y_spec, forward, backward = LAYOUTS[layout]
    q, _, x, sizes = placed(mesh, layout)
    w, sharded_by = dequantize(operands()[0]), lambda spec: NamedSharding(mesh, spec)
    jitted = jax.jit(ql.ragged_dot, out_shardings=sharded_by(y_spec))
    run = jitted.lower(x, q, sizes).compile()
    y = run(x, q, sizes)
    assert_close(y, ragged_product(operands()[2], w, SIZES))

    def input_gradient(x, q, sizes, g):
        return jax.vjp(lambda x: ql.ragged_dot(x, q, sizes), x)[1](g)

    jitted = jax.jit(input_gradient, out_shardings=(sharded_by(x_spec),))
    back = jitted.lower(x, q, sizes, y).compile()
    (dx,) = back(x, q, sizes, y)
    assert_close(dx, ragged_product(y, w.swapaxes(1, 2), SIZES))
    if forward is not None:
        assert collectives(run) == sorted(forward)
        assert collectives(back) == sorted(backward)
    assert most_floats(run.as_text()) < w.size / 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", slow_but_every(3, LAYOUTS))
def test_gradients_of_adapters(mesh, layout):
    check_gradients(mesh, layout)


def check_gradients(mesh, layout, **settings):
    """Compares with gradients of `lax.ragged_dot` and LoRA's formula on one device."""
    q, lora, x, sizes = placed(mesh, layout, **settings)
    whole_q, whole_lora, whole_x = operands(**settings)
    w = dequantize(whole_q)

    def reference(x, lora):
        merged = w + 2 * jnp.einsum("ekr,ern->ekn", lora.a, lora.b)
        return jnp.sum(jnp.square(jax.lax.ragged_dot(x, merged, jnp.array(SIZES)) / 9))

    def loss(x, q, lora, sizes):
        return jnp.sum(jnp.square(ql.ragged_dot(x, q, sizes, lora) / 9))

    got = jax.jit(jax.value_and_grad(loss, (0, 2)))(x, q, lora, sizes)
    want = jax.jit(jax.value_and_grad(reference, (0, 1)))(whole_x, whole_lora)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert_close(a, b)


def test_an_axis_that_does_not_divide_the_experts_is_refused(mesh):
    w = jnp.ones((6, 64, 8))
    with pytest.raises(ValueError, match=r"axis 0 of \(6, 64, 8\) must divide among 4"):
        ql.sharding.place({"w": ql.quantize(w)}, {}, mesh, {"w": P("a")})
