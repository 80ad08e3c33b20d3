"""What a sharded product moves between devices: counted in the compiled program."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dequantize, relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qlora_jax as ql

P = PartitionSpec
NONE: list[str] = []
REDUCE = ["all-reduce f32"]
GATHER = ["all-gather u8"]
# Where W [K, N], x [M, K] and y [M, N] lie; what forward and backward pass must move.
LAYOUTS = {
    "replicated": (P(), P(), P(), NONE, NONE),
    "data": (P(), P("a"), P("a"), NONE, NONE),
    "column": (P(None, "b"), P(), P(None, "b"), NONE, REDUCE),
    "row": (P("b"), P(None, "b"), P(), REDUCE, NONE),
    "data and column": (P(None, "b"), P("a"), P("a", "b"), NONE, REDUCE),
    "data and row": (P("b"), P("a", "b"), P("a"), REDUCE, NONE),
    "fsdp along K": (P("a"), P("a"), P("a"), GATHER, GATHER),
    "fsdp along N": (P(None, "a"), P("a"), P("a"), GATHER, GATHER),
    "fsdp over both": (P(("a", "b")), P(("a", "b")), P(("a", "b")), GATHER, GATHER),
    "fsdp and column": (P("a", "b"), P("a"), P("a", "b"), GATHER, GATHER + REDUCE),
    "fsdp and row": (P("b", "a"), P("a", "b"), P("a"), GATHER + REDUCE, GATHER),
    "2d": (P("a", "b"), P(None, "a"), P(None, "b"), REDUCE, REDUCE),
}
OPERATION = re.compile(
    r"= \(?(\w+)\[[^=]*? (all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)


def collectives(compiled):
    """Names and element types, such as `all-gather u8`, in alphabetical order."""
    found = OPERATION.findall(compiled.as_text())
    return sorted(f"{name} {dtype}" for dtype, name in found)


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    kind = getattr(AxisType, request.param)
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))


def sharded(q, mesh, spec, stacked=False):
    """The packed weights with codes and scales split, nested scales replicated."""
    spec = P(None, *spec) if stacked else spec
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    return dataclasses.replace(
        q,
        codes=put(q.codes, spec),
        scales=put(q.scales, spec),
        scale_scales=put(q.scale_scales, P()),
        scale_offset=put(q.scale_offset, P()),
    )


def operands(k=512, n=64, lead=(), seed=0):
    rng = np.random.default_rng(seed)
    q = ql.quantize(rng.normal(size=(*lead, k, n)).astype(np.float32))
    return q, rng.normal(size=(8, k)).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward(mesh, layout):
    w_spec, x_spec, y_spec, forward, backward = LAYOUTS[layout]
    q, x = operands()
    w = dequantize(q)
    at = lambda spec: NamedSharding(mesh, spec)
    qs, xs = sharded(q, mesh, w_spec), jax.device_put(x, at(x_spec))
    run = jax.jit(ql.matmul, out_shardings=at(y_spec)).lower(xs, qs).compile()
    assert collectives(run) == sorted(forward)
    y = run(xs, qs)
    assert relative_error(y, x @ w) < 1e-5

    pull = lambda x, q, g: jax.vjp(lambda x: ql.matmul(x, q), x)[1](g)[0]
    back = jax.jit(pull, out_shardings=at(x_spec)).lower(xs, qs, y).compile()
    assert collectives(back) == sorted(backward)
    assert relative_error(back(xs, qs, y), np.asarray(y) @ w.T) < 1e-5


@pytest.mark.parametrize("layout", ["column", "row", "fsdp along K", "fsdp along N"])
def test_a_layer_of_a_stack(mesh, layout):
    """The stack stays where it is: one layer is gathered, and in bytes."""
    w_spec, x_spec, y_spec, forward, _ = LAYOUTS[layout]
    q, x = operands(lead=(3,))
    at = lambda spec: NamedSharding(mesh, spec)
    qs = sharded(q, mesh, w_spec, stacked=True)
    xs = jax.device_put(x, at(x_spec))
    product = lambda x, q, layer: ql.matmul(x, q, layer=layer)
    layer = jax.device_put(np.int32(2), at(P()))
    run = jax.jit(product, out_shardings=at(y_spec)).lower(xs, qs, layer).compile()
    assert collectives(run) == sorted(forward)
    assert relative_error(run(xs, qs, layer), x @ dequantize(q)[2]) < 1e-5


@pytest.mark.parametrize("w_spec", [P("a"), P(None, "a"), P("a", "b")])
def test_blocks_that_do_not_split_evenly_are_gathered(mesh, w_spec):
    """Six blocks over four devices: codes split, though no device has whole blocks."""
    q, x = operands(k=6 * 64, n=64)
    at = lambda spec: NamedSharding(mesh, spec)
    put = lambda a, spec: jax.device_put(a, at(spec))
    qs = dataclasses.replace(
        jax.tree.map(lambda a: put(a, P()), q), codes=put(q.codes, w_spec)
    )
    run = jax.jit(ql.matmul, out_shardings=at(P()))
    assert relative_error(run(put(x, P()), qs), x @ dequantize(q)) < 1e-5
    grad = jax.jit(jax.grad(lambda x, q: jnp.sum(ql.matmul(x, q))))
    want = np.broadcast_to(dequantize(q).sum(-1), x.shape)
    assert relative_error(grad(put(x, P()), qs), want) < 1e-5


def test_experts_stay_with_their_device(mesh):
    q, x = operands(lead=(4,))
    x = np.stack([x + i for i in range(4)])
    at = lambda spec: NamedSharding(mesh, spec)
    qs = jax.tree.map(lambda a: jax.device_put(a, at(P("a"))), q)
    xs = jax.device_put(x, at(P("a")))
    run = jax.jit(ql.matmul, out_shardings=at(P("a"))).lower(xs, qs).compile()
    assert collectives(run) == []
    assert relative_error(run(xs, qs), x @ dequantize(q)) < 1e-5


def test_shard_map(mesh):
    """Row-parallel by hand: each device multiplies its blocks, and they are added."""
    q, x = operands()
    q = ql.quantize(np.asarray(ql.dequantize(q)), double_quant=False)
    in_specs = (P("a", "b"), jax.tree.map(lambda _: P("b"), q))
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    xs, qs = put(x, in_specs[0]), jax.tree.map(put, q, in_specs[1])

    def local(x, q):
        return jax.lax.psum(ql.matmul(x, q), "b")

    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P("a"))
    compiled = jax.jit(run).lower(xs, qs).compile()
    assert collectives(compiled) == REDUCE
    assert relative_error(compiled(xs, qs), x @ dequantize(q)) < 1e-5
    loss = lambda x, q: jnp.sum(run(x, q) ** 2)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(xs, qs)
    w = dequantize(q)
    assert relative_error(got, 2 * (x @ w) @ w.T) < 1e-5


def test_auto_mode_made_explicit():
    """How an Auto program says what lies where, for a partitioner that cannot ask."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    q, x = operands()
    at = lambda spec: NamedSharding(mesh, spec)
    qs, xs = sharded(q, mesh, P("a")), jax.device_put(x, at(P("a")))
    specs = (P("a"), jax.tree.map(lambda a: a.sharding.spec, qs))
    with jax.set_mesh(mesh):
        product = jax.sharding.explicit_axes(ql.matmul, in_sharding=specs)
        run = jax.jit(product).lower(xs, qs).compile()
    assert collectives(run) == GATHER
    assert relative_error(run(xs, qs), x @ dequantize(q)) < 1e-5


def test_a_mesh_of_explicit_and_auto_axes():
    types = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=types)
    q, x = operands()
    w = dequantize(q)
    at = lambda spec: NamedSharding(mesh, spec)
    qs, xs = sharded(q, mesh, P(None, "b")), jax.device_put(x, at(P("a")))
    y = jax.jit(ql.matmul)(xs, qs)
    assert jax.typeof(y).sharding.spec == P("a", None)
    assert relative_error(y, x @ w) < 1e-5
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(lambda x, q: jnp.sum(ql.matmul(x, q) ** 2)))(xs, qs)
    assert relative_error(got, 2 * (x @ w) @ w.T) < 1e-5
