"""Products of operands that are split over a mesh at random equal the plain ones."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import dequantize, relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qlora_jax as ql
from qlora_jax.quant.placement import Placement

P = PartitionSpec
MESHES = {"2x2x2": (2, 2, 2), "2x4": (2, 4)}
KINDS = ["matrix", "rows", "layer", "experts", "layer of experts", "apply"]
# In Auto mode kernels have no placement, or a random one.
MODES = {
    "Auto": AxisType.Auto,
    "Auto, placed": AxisType.Auto,
    "Explicit": AxisType.Explicit,
}
# Every 27th is quick: 12 layouts. CI runs 78 of all 324 with the newest JAX too: these,
# and two seeds of each kind.
DRAWS = [
    pytest.param(
        seed,
        marks=[pytest.mark.slow] * bool(seed % 27) + [pytest.mark.newest] * (seed < 12),
    )
    for seed in range(54)
]


def make_mesh(shape, axis_type):
    names = tuple("abc"[: len(shape)])
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def draw_axes(rng, mesh, count):
    """Mesh axes for some axes of an array of any shape."""
    axes = [()] * count
    for name in rng.permutation(mesh.axis_names):
        if (axis := rng.integers(-1, count)) >= 0:
            axes[axis] += (str(name),)
    return tuple(axes)


def declare(rng, mesh, tree):
    """Gives every packed kernel of a tree a placement at random."""

    def one(q):
        if not isinstance(q, ql.QTensor):
            return q
        axes = draw_axes(rng, mesh, q.codes.ndim), draw_axes(rng, mesh, 2)
        placement = Placement((*mesh.shape.items(),), *axes)
        return dataclasses.replace(q, placement=placement)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, ql.QTensor))


def draw_spec(rng, mesh, shape):
    """Gives each mesh axis to one axis of an array that it divides, or to none."""
    entries = [() for _ in shape]
    for name in rng.permutation(mesh.axis_names):
        axis = rng.integers(-1, len(shape))
        if axis < 0:
            continue
        ways = math.prod(mesh.shape[n] for n in (*entries[axis], name))
        if shape[axis] % ways == 0:
            entries[axis] += (str(name),)
    return P(*(entry if len(entry) != 1 else entry[0] for entry in entries))


def place(rng, mesh, tree):
    """Puts every array of a tree on the mesh, each split at random."""
    put = lambda a: jax.device_put(
        a, NamedSharding(mesh, draw_spec(rng, mesh, np.shape(a)))
    )
    return jax.tree.map(put, tree)


def specs(tree):
    return [(a.shape, a.sharding.spec) for a in jax.tree.leaves(tree)]


def draw_case(rng, kind):
    """A kernel, an input and a product: of arrays on one device, and its formula."""
    k, n = int(rng.choice([64, 96, 128])), int(rng.choice([8, 12, 32]))
    block_size, double_quant = int(rng.choice([16, 32])), bool(rng.integers(2))
    lead = {"layer": (2,), "experts": (4,), "layer of experts": (2, 4)}.get(kind, ())
    rows = {"matrix": (8,), "rows": (4, 6)}.get(kind, (8,))
    batch = lead[-1:] if "experts" in kind else ()
    w = rng.normal(size=(*lead, k, n)).astype(np.float32)
    x = rng.normal(size=(*batch, *rows, k)).astype(np.float32)
    if kind == "apply":
        config = ql.QLoRAConfig(
            rank=4, block_size=block_size, double_quant=double_quant
        )
        base, lora = ql.init(jax.random.key(0), {"kernel": w}, config)
        lora = jax.tree.map(lambda a: a + 0.1, lora)
        adapter = lora["kernel"]
        floats = dequantize(base["kernel"]) + np.asarray(adapter.a) @ adapter.b
        return (base, lora), x, lambda x, trees: ql.apply(*trees, x), floats
    q = ql.quantize(w, block_size=block_size, double_quant=double_quant)
    layer = 1 if "layer" in kind else None
    floats = dequantize(q) if layer is None else dequantize(q)[layer]
    return q, x, lambda x, q: ql.matmul(x, q, layer=layer), floats


@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", DRAWS)
def test_product_and_gradient(mesh_name, mode, seed):
    rng = np.random.default_rng(seed)
    mesh = make_mesh(MESHES[mesh_name], MODES[mode])
    kernel, x, product, floats = draw_case(rng, KINDS[seed % len(KINDS)])
    x_on_mesh, kernel_on_mesh = place(rng, mesh, x), place(rng, mesh, kernel)
    if mode == "Auto, placed":
        kernel_on_mesh = declare(rng, mesh, kernel_on_mesh)
    layout = specs((x_on_mesh, kernel_on_mesh)), kernel_on_mesh

    def run(x, kernel):
        y = product(x, kernel)
        return jnp.sum(jnp.sin(y)), y

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(run, has_aux=True))
        dx, y = grad(x_on_mesh, kernel_on_mesh)
    want = x @ floats
    assert relative_error(y, want) < 1e-5, layout
    want = np.cos(want) @ np.swapaxes(floats, -1, -2)
    assert relative_error(dx, want) < 1e-5, layout


def linen_case(x):
    model = nn.Dense(24, bias_init=nn.initializers.normal())
    params = model.init(jax.random.key(0), x)["params"]
    trees = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
    apply = ql.linen.wrap(model).apply
    return trees, lambda x, trees: apply({"params": trees[0], "lora": trees[1]}, x)


def nnx_case(x):
    init = nnx.initializers.normal()
    model = nnx.Linear(x.shape[-1], 24, bias_init=init, rngs=nnx.Rngs(0))
    model = ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(1))
    graph, state = nnx.split(model)
    return state, lambda x, state: nnx.merge(graph, state)(x)


CONFIG = ql.QLoRAConfig(rank=4, block_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [linen_case, nnx_case])
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.newest), 1])
def test_layers_of_flax(mesh_name, mode, make, seed):
    rng = np.random.default_rng(100 + seed)
    mesh = make_mesh(MESHES[mesh_name], MODES[mode])
    x = rng.normal(size=(8, 64)).astype(np.float32)
    variables, layer = make(x)
    variables = jax.tree.map(lambda a: a + 0.1 if a.dtype == "f" else a, variables)

    def run(x, variables):
        y = layer(x, variables)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.jit(jax.grad(run, has_aux=True))
    want = grad(x, variables)
    on_mesh = place(rng, mesh, x), place(rng, mesh, variables)
    if mode == "Auto, placed":
        on_mesh = on_mesh[0], declare(rng, mesh, on_mesh[1])
    with jax.set_mesh(mesh):
        got = grad(*on_mesh)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5, (specs(on_mesh), on_mesh)
