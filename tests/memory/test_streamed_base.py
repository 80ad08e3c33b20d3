"""Packed stacks in host memory: same results, and each pass moves a layer once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same, fast_and_slow, make_mesh, normal, spread, trees_of
from integration_models import NNXMLP
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qlora_jax as ql
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder

LAYERS = 3


def one_device(kind="Auto"):
    return jax.make_mesh((1,), ("x",), (AxisType[kind],), devices=jax.devices()[:1])


def place(base, lora=None, memory="host"):
    return ql.sharding.place(base, lora or {}, one_device(), memory=memory)


def equations(jaxpr, loops=0):
    """Yields each equation of a program with the number of loops around it."""
    for eqn in jaxpr.eqns:
        yield eqn, loops
        inside = loops + (eqn.primitive.name in ("scan", "while"))
        for value in jax.tree.leaves([*eqn.params.values()], is_leaf=has_program):
            if has_program(value):
                yield from equations(getattr(value, "jaxpr", value), inside)


def has_program(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def moved_and_held(fn, *args):
    """Returns the depth of loops around each move, and the largest uint8 array made.

    A byte holds two packed codes, or one code while a layer is decoded.
    """
    moves, largest = [], 0
    for eqn, loops in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name == "device_put":
            for before, after in zip(eqn.invars, eqn.outvars, strict=True):
                kinds = before.aval.memory_space, after.aval.memory_space
                if kinds == (jax.memory.Space.Host, jax.memory.Space.Device):
                    moves.append(loops)
        for var in eqn.outvars:
            is_bytes = getattr(var.aval, "dtype", None) == jnp.uint8
            if is_bytes and var.aval.memory_space == jax.memory.Space.Device:
                largest = max(largest, var.aval.size)
    return moves, largest


# By hand


@functools.cache
def stack(rows=64, columns=24, double_quant=True):
    w = normal(0, (LAYERS, rows, columns))
    return ql.quantize(w, block_size=16, double_quant=double_quant)


def by_hand(rows=64):
    """Returns a stack on the device, the same on the host, and inputs."""
    q = stack(rows)
    return q, place({"kernel": q})[0]["kernel"], normal(1, (5, rows))


def by_index(x, q):
    def layer(x, i):
        return (jnp.tanh(ql.matmul(x, q, layer=i)) @ mixer(q), None)

    return layer, jnp.arange(LAYERS)


def by_slices(x, q):
    return lambda x, q: (jnp.tanh(ql.matmul(x, q)) @ mixer(q), None), q


def mixer(q):
    return jnp.ones((q.shape[-1], q.shape[-2])) / 9


def loss_by_hand(x, q, split, remat):
    layer, xs = split(x, q)
    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jnp.sum(jnp.square(jax.lax.scan(layer, x, xs)[0]))


# Of 48 and 80 rows of 4-bit codes, which are 24 and 40, the tiles of 8 are full.
@pytest.mark.parametrize("rows", fast_and_slow([48], [64, 80]))
@pytest.mark.parametrize("split", [by_index, by_slices])
def test_by_hand_value_and_gradient_are_those_of_the_resident_base(rows, split):
    q, host, x = by_hand(rows)
    for remat in (False, True):
        loss = functools.partial(loss_by_hand, split=split, remat=remat)
        fn = jax.jit(jax.value_and_grad(loss))
        assert_same(fn(x, host), fn(x, q))


@pytest.mark.parametrize("split", [by_index, by_slices])
@pytest.mark.parametrize("remat", [False, True])
def test_the_device_holds_the_codes_of_one_layer(split, remat):
    _, host, x = by_hand()
    grad = jax.grad(functools.partial(loss_by_hand, split=split, remat=remat))
    moves, largest = moved_and_held(grad, x, host)
    assert set(moves) == {1} and largest == 64 * 24


def test_codes_that_are_moved_outside_of_a_checkpoint_are_kept():
    _, host, x = by_hand()

    def loss(x, q):
        def fetch_layer(i):
            return ql.memory.to_device(q, i)

        def layer(x, i):
            return (jnp.tanh(ql.matmul(x, fetch_layer(i))) @ mixer(q), None)

        return jnp.sum(jax.lax.scan(layer, x, jnp.arange(LAYERS))[0])

    assert moved_and_held(jax.grad(loss), x, host)[1] == LAYERS * 32 * 24


def test_the_layer_outside_of_a_loop():
    q, host, x = by_hand()
    assert_same(ql.matmul(x, host, layer=1), ql.matmul(x, q, layer=1))


def test_by_hand_in_tiles_a_layer_is_moved_once():
    up, down = stack(64, 32), stack(32, 64)
    x = normal(1, (2, 16, 64))
    host = place({"up": up, "down": down})[0]

    def loss(x, mlp, to_device):
        def layer(x, i):
            layer_mlp = ql.memory.to_device(mlp, i) if to_device else mlp
            layer_option = {} if to_device else {"layer": i}

            def inner(x):
                return jnp.tanh(ql.matmul(x, layer_mlp["up"], **layer_option))

            def apply_mlp(x):
                return x + ql.matmul(inner(x), layer_mlp["down"], **layer_option)

            return ql.memory.tiled(apply_mlp, 4)(x), None

        layer = jax.checkpoint(layer, prevent_cse=False)
        return jnp.sum(jnp.square(jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]))

    grad = functools.partial(jax.value_and_grad(loss), to_device=True)
    plain = functools.partial(jax.value_and_grad(loss), to_device=False)
    want = jax.jit(plain)(x, {"up": up, "down": down})
    assert_same(jax.jit(grad)(x, host), want)
    moves, largest = moved_and_held(grad, x, host)
    assert moves == [1] * 4 and largest == 64 * 32  # two kernels, each way
    # Without `to_device`, layers are moved inside the loop over tiles.
    assert set(moved_and_held(plain, x, host)[0]) == {2}


# Trees


def test_place_moves_codes_of_stacks_alone():
    params = {
        "stack": normal(0, (3, 64, 8)),
        "one": normal(1, (64, 8)),
        "b": normal(2, ()),
    }
    base, lora = trees_of(params, rank=2, block_size=16, targets=("stack", "one"))
    placed = place(base, lora)
    kinds = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.sharding.memory_kind
        for path, x in jax.tree_util.tree_leaves_with_path(placed)
    }
    on_host = [path for path, kind in kinds.items() if kind == "pinned_host"]
    assert on_host == ["0/stack/codes/array"] and len(kinds) == 13
    codes = placed[0]["stack"].codes.array
    assert codes.shape == (3, 4, 8, 8)  # the last two axes are a tile
    np.testing.assert_array_equal(
        np.asarray(codes).reshape(3, 32, 8), base["stack"].codes
    )
    assert [placed[0][name].memory for name in ("stack", "one")] == ["host", "device"]
    # As shapes, and under jit.
    shapes = place(*jax.eval_shape(lambda: (base, lora)))

    def describe_leaves(tree):
        return [
            (x.shape, x.dtype, x.sharding.memory_kind or "device")
            for x in jax.tree.leaves(tree)
        ]

    assert describe_leaves(shapes) == describe_leaves(placed)
    assert describe_leaves(jax.jit(place)(base, lora)) == describe_leaves(placed)
    assert jax.tree.structure(shapes) == jax.tree.structure(placed)
    # To the host and back.
    back = place(*placed, memory="device")
    assert_same(jax.tree.leaves(back), jax.tree.leaves((base, lora)))
    assert back[0]["stack"].codes.sharding.memory_kind == "device"


def test_what_place_refuses():
    base = {"kernel": stack()}
    with pytest.raises(ValueError, match='`memory` must be "device" or "host"'):
        ql.sharding.place(base, {}, one_device(), memory="disk")
    with pytest.raises(ValueError, match="where the mesh has Explicit axes"):
        ql.sharding.place(base, {}, one_device("Explicit"), memory="host")
    with pytest.raises(ValueError, match="where no kernel is a packed stack"):
        place({"kernel": ql.quantize(normal(0, (64, 8)))})


def test_what_reads_the_weights_reads_the_same(tmp_path):
    params = {
        "up": {"kernel": normal(0, (LAYERS, 48, 24))},
        "down": {"kernel": normal(1, (LAYERS, 64, 24))},
    }
    base, lora = trees_of(params, rank=2, block_size=16)
    host, host_lora = place(base, lora)
    assert_same(ql.dequantize(host), ql.dequantize(base))
    assert_same(ql.merge(host, host_lora), ql.merge(base, lora))
    assert host["up"]["kernel"].shape == base["up"]["kernel"].shape
    assert host["up"]["kernel"].nbytes == base["up"]["kernel"].nbytes

    def down(*trees):
        return str(ql.summary(*({"down": tree["down"]} for tree in trees)))

    assert down(host, host_lora) == down(base, lora)
    paths = tmp_path / "resident.safetensors", tmp_path / "host.safetensors"
    for path, tree in zip(paths, (base, host), strict=True):
        ql.io.save(path, tree)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    restored = ql.io.restore(paths[0], place=lambda base: place(base)[0]).tree
    assert_same(restored, host)
    assert restored["up"]["kernel"].codes.array.sharding.memory_kind == "pinned_host"


# Models


CONFIG = DecoderConfig(64, 32, 48, LAYERS, num_heads=4, num_kv_heads=2)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 64, (2, 24)))


@functools.cache
def decoder_trees():
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    return trees_of(params, rank=2, block_size=16, targets="layers/.*_proj/kernel")


def decoder_loss(scanned=True, **options):
    model = Decoder(CONFIG, **options)
    model = ql.linen.wrap(model, scanned=model.scanned if scanned else ())

    def loss(lora, base):
        logits = model.apply({"params": base, "lora": lora}, TOKENS)
        return jnp.mean(jnp.square(logits))

    return loss


OPTIONS = {
    "products kept": {},
    "remat": {"remat": True},
    "tiles": {"remat": True, "mlp_tile": 8},
    "tiles, products kept": {"mlp_tile": 8},
    "tiles, inputs on the host": {"remat": "offload", "mlp_tile": 8},
    "slices": {"scanned": False, "remat": True},
    "slices, tiles": {"scanned": False, "remat": True, "mlp_tile": 8},
}


# LLVM optimizes here, unlike in other tests (conftest.py). Without that, sums of tiles
# would be rounded differently.
OPTIMIZED = {"xla_backend_optimization_level": 3}
OPTIMIZED |= {"xla_llvm_disable_expensive_passes": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_scanned_linen_model_computes_the_same(name):
    base, lora = decoder_trees()
    grad = jax.value_and_grad(decoder_loss(**OPTIONS[name]))
    grad = jax.jit(grad, compiler_options=OPTIMIZED)
    assert_same(grad(*place(base, lora)[::-1]), grad(lora, base))


@pytest.mark.newest
@pytest.mark.parametrize("name", OPTIONS)
def test_a_scanned_linen_model_moves_a_layer_at_a_time(name):
    base, lora = place(*decoder_trees())
    grad = jax.grad(decoder_loss(**OPTIONS[name]))
    moves, largest = moved_and_held(grad, lora, base)
    # Moves are in the loop over layers, never in the inner loop over tiles.
    assert set(moves) == {1} and largest == 32 * 48


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.mlp = NNXMLP(dim=32, hidden=48, rngs=rngs)

    def __call__(self, x, tile=None):
        return x + ql.memory.tiled(self.mlp, tile)(x)


@functools.cache
def nnx_model():
    create = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Block(rngs=rngs)))
    config = ql.QLoRAConfig(rank=2, block_size=16)
    return ql.nnx.wrap(create(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))


def nnx_grad(model, remat, tile):
    """Returns the gradient function of a loss in the adapters, and its arguments."""
    graphdef, lora, other_state = nnx.split(model, nnx.LoRAParam, ...)
    x = normal(5, (2, 24, 32))

    def loss(lora, other_state):
        other_state = jax.tree.map(lambda v: v, other_state)  # variables of this trace

        def body(block, x):
            return block(x, tile)

        body = nnx.remat(body) if remat else body
        scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return jnp.mean(jnp.square(scan(nnx.merge(graphdef, lora, other_state), x)))

    return jax.value_and_grad(loss), (lora, other_state)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("tile", [None, 8])
def test_a_scanned_nnx_model(remat, tile):
    model = nnx_model()
    host = ql.nnx.place(model, one_device(), memory="host")
    grad, args = nnx_grad(model, remat, tile)
    host_grad, host_args = nnx_grad(host, remat, tile)
    got, want = jax.jit(host_grad)(*host_args), jax.jit(grad)(*args)
    assert_same(jax.tree.leaves(got), jax.tree.leaves(want))
    moves, largest = moved_and_held(host_grad, *host_args)
    assert set(moves) == {1} and largest == 32 * 48


# Several devices


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")])
def test_on_a_mesh(spec):
    mesh = make_mesh("Auto", axes=("fsdp", "tensor"))
    rules = {"kernel": spec}
    params = {"kernel": normal(0, (LAYERS, 128, 128))}
    base, lora = trees_of(params, rank=2, block_size=16)
    x = spread(normal(1, (8, 128)), mesh, "fsdp")

    def loss(lora, base):
        def layer(x, args):
            return (jnp.tanh(ql.apply(*args, x)), None)

        args = base["kernel"], lora["kernel"]
        return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, args)[0]))

    def run(memory):
        options = {"rows": ["fsdp"], "memory": memory}
        placed = ql.sharding.place(base, lora, mesh, rules, **options)
        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss))(*placed[::-1])

    assert_same(run("host"), run("device"))
