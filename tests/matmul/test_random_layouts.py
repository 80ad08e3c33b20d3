"""Products of operands that are split over a mesh at random equal the plain ones."""

import dataclasses
import itertools

import fuzz_layouts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_layouts import draw_axes
from helpers import SEED, dequantize, relative_error, slow_but_every, spread
from jax.sharding import AxisType, PartitionSpec

import qlora_jax as ql
from qlora_jax.quant.placement import Placement

P = PartitionSpec
MESHES = [(2, 2, 2), (2, 4)]
PROGRAMS = len(fuzz_layouts.FORMS) * len(fuzz_layouts.MODES)
KINDS = ["matrix", "rows", "layer", "experts", "layer of experts"]
# In Auto mode kernels have no placement, or a random one.
MODES = {
    "Auto": AxisType.Auto,
    "Auto, placed": AxisType.Auto,
    "Explicit": AxisType.Explicit,
}
# QLORA_JAX_SEED draws all anew. test_layout.py runs thousands of layouts in NumPy.
DRAWS = [*itertools.product(MODES, KINDS)]
# x [.., 64 or 96], A and B of adapters whose gradients XLA would compute wrong, and one
# for which XLA of JAX 0.12.0.1 would end the process.
TRAPS = {
    "A": [P("c", "a"), P("c", ("b", "a")), P()],
    "A and B": [P("c"), P(("b", "a"), "c"), P("a", "c")],
    "experts": [P(("c", "b"), None, "a"), P("b", None, "a"), P(None, ("b", "a"), "c")],
    "end": [P("c", ("a", "b")), P("a", "b"), P(None, "a")],
}


def make_mesh(shape, axis_type):
    names = tuple("abc"[: len(shape)])
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def declare(rng, mesh, tree):
    """Gives every packed kernel of a tree a placement at random."""

    def one(q):
        if not isinstance(q, ql.QTensor):
            return q
        axes = (draw_axes(rng, mesh.shape, n) for n in (q.codes.ndim, 2))
        placement = Placement((*mesh.shape.items(),), *axes)
        return dataclasses.replace(q, placement=placement)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, ql.QTensor))


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
    q = ql.quantize(w, block_size=block_size, double_quant=double_quant)
    layer = 1 if "layer" in kind else None
    floats = dequantize(q) if layer is None else dequantize(q)[layer]
    return q, x, lambda x, q: ql.matmul(x, q, layer=layer), floats


@pytest.mark.newest
@pytest.mark.parametrize(("mode", "kind"), slow_but_every(7, DRAWS))
def test_product_and_gradient(mode, kind):
    rng = np.random.default_rng([SEED, DRAWS.index((mode, kind))])
    mesh = make_mesh(MESHES[rng.integers(len(MESHES))], MODES[mode])
    kernel, x, product, floats = draw_case(rng, kind)
    x_on_mesh, kernel_on_mesh = (fuzz_layouts.split(rng, mesh, a) for a in (x, kernel))
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


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("program", range(PROGRAMS))
def test_adapters(program):
    """Each program on each kind of mesh."""
    draw, error = fuzz_layouts.run(SEED * PROGRAMS + program)
    assert error < 1e-5, draw


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("name", TRAPS)
def test_adapters_that_xla_would_compute_wrong(name):
    rng = np.random.default_rng(0)
    mesh = make_mesh((2, 2, 2), AxisType.Explicit)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    has_experts = name == "experts"
    batch = (4,) * has_experts
    params = {"only": {"kernel": normal(*batch, 64, 32)}}
    config = ql.QLoRAConfig(
        rank=8, block_size=16, double_quant=False, contract="bkn" if has_experts else -2
    )
    base, lora = ql.init(jax.random.key(0), params, config)
    lora = jax.tree.map(lambda a: a + normal(*a.shape) / 8, lora)
    x = normal(*batch, 4, 64)
    draw = fuzz_layouts.Draw("gradient", "", mesh, has_experts, (4,), "nf4", False)
    want = fuzz_layouts.in_numpy(draw, base, lora, x)
    put = lambda a, spec: spread(a, mesh, *spec)
    if name == "end":
        q = base["only"]["kernel"]
        codes, scales = put(q.codes, P("a", ("b", "c"))), put(q.scales, P("b"))
        q = dataclasses.replace(q, codes=codes, scales=scales)
        base = {"only": {"kernel": q}}
    x, *factors = map(put, (x, *jax.tree.leaves(lora)), TRAPS[name])
    lora = jax.tree.unflatten(jax.tree.structure(lora), factors)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *args: fuzz_layouts.compute(draw, *args))(base, lora, x)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        assert relative_error(a, b) < 1e-5
