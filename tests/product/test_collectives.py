"""Collectives of sharded products, counted in the compiled program."""

import functools

import hlo_collectives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    dequantize,
    make_mesh,
    normal,
    slow_but_every,
    spread,
    trees_of,
)
from hlo_text import collectives, most_floats, moved_arrays, operations
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import assert_close

import qlora_jax as ql

P = PartitionSpec
NONE: list[str] = []
REDUCE = ["all-reduce f32"]
GATHER = ["all-gather u8"]
# How W [K, N], x [M, K] and y [M, N] are split, and what each pass must move.
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
# The format and block size of some layouts. The others have nf4.
FORMATS = {
    "fsdp along N": ("mxfp4", 32),
    "fsdp over both": ("int4_f16", 32),
    "fsdp and row": ("nvfp4", 16),
    "2d": ("q4_0", 32),
}


def test_operations_are_read_with_all_their_types():
    program = """
  ROOT %y = (u8[8,64]{1,0}, f32[2]{0}) all-gather(%a, %b), channel_id=2
  %z = ((u8[4]{0}, u8[2]{0}), (u8[8]{0}, u8[4]{0})) all-gather-start(%a, %b)
  %d = u8[8]{0} all-gather-done(%z)
  %r = bf16[8]{0:T(8,128)} ragged-all-to-all(%a, %b, %c)
  %t = (f32[4]{0}, /*index=1*/f32[4]{0}) all-reduce(%a, %b), to_apply=%add
  %u = f32[4]{0} fusion(%t), calls=%all-gather.1
"""
    gathers = ["all-gather f32 u8", "all-gather u8", "all-reduce f32"]
    assert operations(program) == [*gathers, "ragged-all-to-all bf16"]
    assert most_floats(program) == 8


def sharded(q, mesh, spec, rows=()):
    """Returns the packed weights, split as their float kernel would be."""
    tree, _ = ql.sharding.place({"w": q}, {}, mesh, {"w": spec}, rows=rows)
    return tree["w"]


@functools.cache
def operands(k=512, n=64, lead=(), packing=("nf4", 64)):
    """Makes operands in NumPy: splitting its arrays compiles nothing."""
    rng = np.random.default_rng(0)
    fmt, block_size = packing
    w = rng.normal(size=(*lead, k, n)).astype(np.float32)
    q = ql.quantize(w, fmt, block_size=block_size)
    x = rng.normal(size=(8, k)).astype(np.float32)
    return jax.tree.map(np.asarray, q), x


@pytest.mark.parametrize("layout", slow_but_every(3, LAYOUTS))
def test_forward_and_backward(mesh, layout):
    w_spec, x_spec, y_spec, forward, backward = LAYOUTS[layout]
    q, x = operands(packing=FORMATS.get(layout, ("nf4", 64)))
    w = dequantize(q)

    def sharded_by(spec):
        return NamedSharding(mesh, spec)

    qs, xs = sharded(q, mesh, w_spec, x_spec[:1]), spread(x, mesh, *x_spec)
    run = jax.jit(ql.matmul, out_shardings=sharded_by(y_spec)).lower(xs, qs).compile()
    assert collectives(run) == sorted(forward)
    y = run(xs, qs)
    assert_close(y, x @ w)

    def input_gradient(x, q, g):
        return jax.vjp(lambda x: ql.matmul(x, q), x)[1](g)[0]

    back = (
        jax.jit(input_gradient, out_shardings=sharded_by(x_spec))
        .lower(xs, qs, y)
        .compile()
    )
    assert collectives(back) == sorted(backward)
    assert_close(back(xs, qs, y), np.asarray(y) @ w.T)


@pytest.mark.parametrize("layout", slow_but_every(5, LAYOUTS))
def test_adapters_move_only_their_own_arrays(mesh, layout):
    """Besides those, passes gather codes and add results as without an adapter."""
    w_spec, x_spec, y_spec, forward, backward = LAYOUTS[layout]
    tree = {"kernel": normal(0, (512, 512))}
    base, lora = trees_of(tree, rank=2, double_quant=False)
    rules = {"kernel": w_spec}
    base, lora = ql.sharding.place(base, lora, mesh, rules, rows=x_spec[:1])
    x = spread(normal(1, (256, 512)), mesh, *x_spec)

    def loss(lora, x, base):
        return jnp.sum(jnp.sin(ql.apply(base, lora, x)))

    def moved(fn, out, *args):
        """Returns whether bytes, and whether whole results move."""
        with jax.set_mesh(mesh):
            compiled = jax.jit(fn, out_shardings=out).lower(*args).compile()
        arrays = moved_arrays(compiled.as_text())
        for name, dtype, size in arrays:
            # A and B have 1024 numbers, and a device's part of the result many more.
            assert size <= 1024 or dtype == "u8" or name == "all-reduce", arrays
        moves_bytes = any(dtype == "u8" for _, dtype, _ in arrays)
        return moves_bytes, any(size > 1024 for _, t, size in arrays if t != "u8")

    is_gathered = GATHER[0] in forward + backward
    y_sums, dx_sums = REDUCE[0] in forward, REDUCE[0] in backward
    out = NamedSharding(mesh, y_spec)
    assert moved(ql.apply, out, base, lora, x) == (is_gathered, y_sums)
    out = jax.tree.map(lambda a: a.sharding, lora)
    assert moved(jax.grad(loss), out, lora, x, base) == (is_gathered, y_sums)
    got = moved(jax.grad(loss, 1), x.sharding, lora, x, base)
    assert got == (is_gathered, y_sums or dx_sums)
    assert moved(ql.merge, None, base, lora) == (False, False)


@pytest.mark.slow
def test_experts_stay_with_their_device(mesh):
    q, x = operands(lead=(4,))
    x = np.stack([x + i for i in range(4)])
    qs, xs = sharded(q, mesh, P("a")), spread(x, mesh, "a")
    out = NamedSharding(mesh, P("a"))
    run = jax.jit(ql.matmul, out_shardings=out).lower(xs, qs).compile()
    assert collectives(run) == []
    assert_close(run(xs, qs), x @ dequantize(q))


# How x, W and the result are split, and whether partial sums of the result, or of the
# gradient of x, have to be added.
BY_HAND = {
    "row": (P("a", "b"), P("b"), P("a"), REDUCE, NONE),
    "column": (P("a"), P(None, "b"), P("a", "b"), NONE, REDUCE),
    "data": (P(("a", "b")), P(), P(("a", "b")), NONE, NONE),
}


@pytest.mark.parametrize("layout", slow_but_every(3, BY_HAND))
def test_shard_map(mesh, layout):
    """Each device multiplies its part. Its packed scales belong to whole columns."""
    x_spec, w_spec, y_spec, forward, backward = BY_HAND[layout]
    double_quant = layout == "data"
    q, x = operands()
    q = ql.quantize(np.asarray(ql.dequantize(q)), double_quant=double_quant)
    specs = jax.tree.map(lambda a: w_spec if a.ndim > 1 else P(), q)

    def put(a, spec):
        return spread(a, mesh, *spec)

    xs, qs = put(x, x_spec), jax.tree.map(put, q, specs)

    def multiply_local(x, q):
        y = ql.matmul(x, q)
        return jax.lax.psum(y, "b") if forward else y

    run = jax.shard_map(
        multiply_local, mesh=mesh, in_specs=(x_spec, specs), out_specs=y_spec
    )
    compiled = jax.jit(run).lower(xs, qs).compile()
    assert collectives(compiled) == forward
    assert_close(compiled(xs, qs), x @ dequantize(q))

    def loss(x, q):
        return jnp.sum(run(x, q) ** 2)

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss)).lower(xs, qs).compile()
    assert collectives(grad) == sorted(forward + backward)
    w = dequantize(q)
    assert_close(grad(xs, qs), 2 * (x @ w) @ w.T)


@pytest.mark.slow
def test_shard_map_with_nested_scales(mesh):
    """Column-parallel: each device packs its columns, with a mean scale of its own."""
    q, x = operands()
    w = dequantize(q)
    xs, ws = spread(x, mesh, "a"), spread(w, mesh, None, "b")

    # The means have a leading axis with one entry per device.
    def pack(w):
        return jax.tree.map(lambda a: a[None], ql.quantize(w))

    pack = jax.shard_map(pack, mesh=mesh, in_specs=P(None, "b"), out_specs=P("b"))

    def product(x, q):
        return ql.matmul(x, jax.tree.map(lambda a: a[0], q))

    specs = {"in_specs": (P("a"), P("b")), "out_specs": P("a", "b")}
    product = jax.shard_map(product, mesh=mesh, **specs)
    qs = jax.jit(pack)(ws)
    run = jax.jit(product).lower(xs, qs).compile()
    assert collectives(run) == []
    halves = [ql.quantize(half) for half in np.split(w, 2, axis=1)]
    for got, want in zip(qs.codes, halves, strict=True):
        np.testing.assert_array_equal(got, want.codes)
    want = np.concatenate([x @ dequantize(half) for half in halves], axis=1)
    assert_close(run(xs, qs), want)


@pytest.mark.slow
def test_adapters_learn_under_shard_map(mesh):
    """Data-parallel: all devices have the same adapters, and gradients are summed."""
    base, lora = trees_of({"kernel": normal(0, (64, 8))}, rank=2)
    x = normal(1, (8, 64))

    def loss(lora, base, x):
        return jnp.sum(ql.apply(base, lora, x) ** 2)

    want = jax.jit(jax.grad(loss))(lora, ql.dequantize(base), x)
    specs = P(), P(), P(("a", "b"))

    def summed_loss(*args):
        return jax.lax.psum(loss(*args), ("a", "b"))

    shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    args = spread(lora, mesh), spread(base, mesh), spread(x, mesh, ("a", "b"))
    with jax.set_mesh(mesh):
        outside = jax.jit(jax.grad(shards(summed_loss)))(*args)
        inside = jax.jit(shards(jax.grad(loss)))(*args)
    for got in (outside, inside):
        assert_close(got, want)


def test_auto_mode_made_explicit():
    """A program in Auto mode may make its axes Explicit."""
    mesh = make_mesh("Auto")
    q, x = operands()
    qs, xs = sharded(q, mesh, P("a")), spread(x, mesh, "a")
    specs = (P("a"), jax.tree.map(lambda a: a.sharding.spec, qs))
    with jax.set_mesh(mesh):
        product = jax.sharding.explicit_axes(ql.matmul, in_sharding=specs)
        run = jax.jit(product).lower(xs, qs).compile()
    assert collectives(run) == GATHER
    assert_close(run(xs, qs), x @ dequantize(q))


@pytest.mark.parametrize("w_spec", [P("a"), P("b", "a")])
def test_tiles_of_tokens_gather_a_kernel_once(mesh, w_spec):
    """`a` splits the rows of x, and `b` the contracted axis, which stays split."""
    q, _ = operands(k=256, n=32)
    x = np.random.default_rng(1).normal(size=(4, 12, 256)).astype(np.float32)
    w = dequantize(q)
    qs = sharded(q, mesh, w_spec, ("a",))

    def loss(x, q, tile):
        mlp = jax.tree_util.Partial(lambda q, x: jnp.sin(ql.matmul(x, q)), q)
        return jnp.sum(jnp.cos(ql.memory.tiled(mlp, tile)(x)))

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    xs = spread(x, mesh, "a")
    gathers = {}
    for tile in (None, 4):
        program = grad.lower(xs, qs, tile).compile()
        rows = hlo_collectives.collectives(program.as_text())
        gathers[tile] = [r for r in rows if r["dtype"] == "u8"]
        value, dx = program(xs, qs)
        y = x.astype(np.float64) @ w
        # The error of a cosine is that of its angle, so the angle gives the magnitude.
        assert_close(value, np.cos(np.sin(y)).sum(), magnitude=float(np.linalg.norm(y)))
        expected = (-np.sin(np.sin(y)) * np.cos(y)) @ w.T
        assert_close(dx, expected, magnitude=y.std() * expected)
    assert gathers[4] == gathers[None]
    # Half a byte of codes per weight, and float32 scales. XLA may share the gathered
    # arrays between the passes.
    (gather,) = gathers[4]
    share = 1 if w_spec == P("a") else mesh.shape["b"]
    kernel_bytes = (256 * 32 // 2 + 4 * 256 // 64 * 32) // share
    assert (
        gather["count"] in (1, 2) and gather["bytes"] == gather["count"] * kernel_bytes
    )
