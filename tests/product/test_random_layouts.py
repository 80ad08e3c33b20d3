"""Programs on operands that are split over a mesh at random equal NumPy's results.

Another QLORA_JAX_SEED gives other draws. test_layout.py runs thousands of layouts in
NumPy.
"""

import dataclasses

import fuzz_layouts
import jax
import numpy as np
import pytest
from helpers import SEED, slow_but_every, spread
from jax.sharding import AxisType, PartitionSpec
from tolerances import assert_close

import qlora_jax as ql

P = PartitionSpec
PROGRAMS = len(fuzz_layouts.FORMS) * len(fuzz_layouts.MODES)
# Specs of x [.., 64 or 96], A and B for which XLA alone would compute wrong gradients,
# and one for which XLA of JAX 0.12.0.1 would end the process.
TRAPS = {
    "A": [P("c", "a"), P("c", ("b", "a")), P()],
    "A and B": [P("c"), P(("b", "a"), "c"), P("a", "c")],
    "experts": [P(("c", "b"), None, "a"), P("b", None, "a"), P(None, ("b", "a"), "c")],
    "end": [P("c", ("a", "b")), P("a", "b"), P(None, "a")],
}


@pytest.mark.newest
@pytest.mark.parametrize("program", slow_but_every(7, range(PROGRAMS)))
def test_adapters(program):
    """Each program on each kind of mesh."""
    got, want, draw = fuzz_layouts.run(SEED * PROGRAMS + program)
    print(draw)
    assert_close(jax.tree.leaves(got), want)


@pytest.mark.newest
@pytest.mark.parametrize("program", slow_but_every(5, range(2 * PROGRAMS)))
def test_merged_kernels_are_split_like_packed_ones(program):
    merged, decoded, draw = fuzz_layouts.merged_and_decoded(SEED * PROGRAMS + program)
    print(draw)
    for got, want in zip(*map(jax.tree.leaves, (merged, decoded)), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim), got.sharding


@pytest.mark.newest
@pytest.mark.parametrize("name", TRAPS)
def test_adapters_that_xla_would_compute_wrong(name):
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((2, 2, 2), tuple("abc"), axis_types=(AxisType.Explicit,) * 3)

    def draw_normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    has_experts = name == "experts"
    batch = (4,) * has_experts
    params = {"only": {"kernel": draw_normal(*batch, 64, 32)}}
    config = ql.QLoRAConfig(
        rank=8, block_size=16, double_quant=False, contract="bkn" if has_experts else -2
    )
    base, lora = ql.init(jax.random.key(0), params, config)
    lora = jax.tree.map(lambda a: a + draw_normal(*a.shape) / 8, lora)
    x = draw_normal(*batch, 4, 64)
    draw = fuzz_layouts.Draw("gradient", "", mesh, has_experts, (4,), "nf4", False)
    want = fuzz_layouts.in_numpy(draw, base, lora, x)

    def put(a, spec):
        return spread(a, mesh, *spec)

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
        assert_close(a, b)
